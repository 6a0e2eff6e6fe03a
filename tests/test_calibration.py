"""Calibration data: sources, documents, windows, sampling and their mix."""

from __future__ import annotations

import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from lillama_core.data.documents import document_of, render_chat, replace_surrogates
from lillama_core.data.self_generated import sampling
from lillama_core.data.sources import Source
from lillama_core.data.text import files, windows
from lillama_core.data.text import named as named_module
from lillama_core.data.text.calibration import CalibrationData, interleaved, load_calibration, load_text_windows
from lillama_core.data.text.checks import check_sources
from lillama_core.data.text.options import CalibrationOptions
from lillama_core.errors import LillamaError, UserError
from lillama_core.system.cache import default_cache_dir
from lillama_core.system.progress import Progress

WORDS = [f"w{i}" for i in range(200)]
SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
EXTRA = ["user", "assistant", "system", ":", "hello", "there", "be", "kind", "Jul", "26", "2024"]
BOS, EOS = 1, 2
LENGTH = 8
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *EXTRA, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=16,
    )
    tokenizer.chat_template = template
    return tokenizer


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """One that begins no text with a token of its own, though it has one."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


class CountingModel(LlamaForCausalLM):
    """Counts how often it is asked to write."""

    calls = 0
    static = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.static += "past_key_values" in kwargs
        return super().generate(*args, **kwargs)


def make_model(kind: type = CountingModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(SPECIAL) + len(EXTRA) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return kind(LlamaConfig(**(settings | changes))).train()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Any:
    return make_model()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def numbered(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


def text_file(folder: Path, count: int = 400, name: str = "a.txt") -> Path:
    path = folder / name
    path.write_text(numbered(count), encoding="utf-8")
    return path


def jsonl_file(folder: Path, rows: list[Any], name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def options(*sources: str | Path, **changes: Any) -> CalibrationOptions:
    parsed = tuple(Source.parse(str(source)) for source in sources)
    settings: dict[str, Any] = {"tokens": 80, "sequence_length": LENGTH, "self_share": 0.0}
    return CalibrationOptions(sources=parsed, **(settings | changes))


def load(chosen: CalibrationOptions, model: Any, tokenizer: Any, cache: Path, **more: Any) -> CalibrationData:
    settings: dict[str, Any] = {"model_fingerprint": "m", "device": "cpu", "progress": Progress("quiet")}
    return load_calibration(chosen, model, tokenizer, cache_dir=cache, **(settings | more))


# --- sources ---


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("self", "self", 1.0),
        ("a.txt@2.5", "a.txt", 2.5),
        ("notes@home.txt", "notes@home.txt", 1.0),
        ("notes@home.txt@3", "notes@home.txt", 3.0),
        ("a@2@1", "a@2", 1.0),
        ("org/name:config:split@0.5", "org/name:config:split", 0.5),
    ],
)
def test_source_is_read_and_written_back(text: str, name: str, weight: float) -> None:
    source = Source.parse(text)
    assert source == Source(name, weight)
    assert Source.parse(str(source)) == source


@pytest.mark.parametrize("text", ["", "@2", "a@", "a@0", "a@-1", "a@nan", "a@inf"])
def test_source_without_name_or_with_bad_weight(text: str) -> None:
    with pytest.raises(UserError):
        Source.parse(text)


def test_weights_of_any_size_survive_writing() -> None:
    for weight in (1 / 3, 1e-9, 1e22, 7.0):
        assert Source.parse(str(Source("x", weight))).weight == weight


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    text_file(tmp_path, name="corpus.txt")
    with pytest.raises(UserError, match=r"no such file, and not a dataset name.*did you mean 'corpus.txt'"):
        check_sources(options(tmp_path / "corpsu.txt"))


def test_misspelt_dataset_suggests_the_alias() -> None:
    with pytest.raises(UserError, match="did you mean 'wikitext2'"):
        check_sources(options("wikitxt2"))


def test_dataset_names_are_plausible_without_network() -> None:
    check_sources(options("wikitext2", "slimorca", "org/name:config:test", "inkuba-mono::train"))


@pytest.mark.parametrize("name", ["data/missing.txt", "./org/name", "a/b/c", "org/name:a:b:c"])
def test_paths_are_not_taken_for_datasets(name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        check_sources(options(name))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("  \n ")
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin.txt").write_bytes("Käse ".encode("latin-1") * 10)
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"nothing of the kind")
    (tmp_path / "folder").mkdir()
    expected = {
        "empty.txt": "is empty",
        "blank.txt": "is empty",
        "binary.bin": "not a text file",
        "latin.txt": "not UTF-8 text",
        "bad.parquet": "cannot be read",
        "bad.jsonl.gz": "cannot be read",
        "folder": "is a directory",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            check_sources(options(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_character_cut_by_the_first_look_is_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" + "ä" * 40_000, encoding="utf-8")
    check_sources(options(path))


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    cases: dict[str, CalibrationOptions] = {
        "do not fill one sequence": options(tokens=7),
        "too small": options(sequence_length=1),
        "between 0 and 1": options(self_share=1.5),
        "leaves no tokens": options(path, self_share=1.0),
        "named twice": options(path, path),
        "has weight -1": CalibrationOptions(sources=(Source("self", -1),)),
    }
    for message, chosen in cases.items():
        with pytest.raises(UserError, match=message):
            check_sources(chosen)


# --- running text ---


def test_text_windows_are_those_of_one_encode(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    path = text_file(tmp_path)
    data = load(options(path), None, tokenizer, cache)
    whole = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    # The token that begins every text stands where the first of each window was.
    windows = {(BOS, *whole[i + 1 : i + LENGTH]) for i in range(0, len(whole), LENGTH)}
    assert data.rows.shape == (10, LENGTH)
    assert data.rows.dtype == torch.int64
    assert len({tuple(row) for row in data.rows.tolist()} & windows) == 10
    json.dumps(data.description)
    assert data.description[str(path)]["tokens"] == 80


def test_seed_chooses_the_windows(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    for path in (
        text_file(tmp_path),
        jsonl_file(tmp_path, [{"text": numbered(7, i)} for i in range(100)]),
    ):
        first, again = (load(options(path, seed=3), None, tokenizer, cache) for _ in range(2))
        other = load(options(path, seed=4), None, tokenizer, cache)
        assert torch.equal(first.rows, again.rows)
        assert first.sha256 == again.sha256
        assert first.sha256 != other.sha256
        assert first.description[str(path)]["sha256"] != other.description[str(path)]["sha256"]


def test_evaluation_takes_the_first_windows_in_order(tmp_path: Path, tokenizer: Any) -> None:
    path = text_file(tmp_path, 100, "notes.md")
    whole = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    source = Source(str(path))
    rows = torch.tensor(whole[:96]).view(12, LENGTH)
    assert torch.equal(load_text_windows(source, plain_tokenizer(), LENGTH, 3), rows[:3])
    assert torch.equal(load_text_windows(source, plain_tokenizer(), LENGTH, 0), rows)
    assert load_text_windows(source, tokenizer, LENGTH, 1000).shape == (12, LENGTH)
    drawn = load_text_windows(source, tokenizer, LENGTH, 3, seed=1)
    assert not torch.equal(drawn[:, 1:], rows[:3, 1:])
    rows[:, 0] = BOS
    assert torch.equal(load_text_windows(source, tokenizer, LENGTH, 0), rows)


def test_evaluation_needs_text_of_a_window_at_least(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="has 5 tokens, less than one window"):
        load_text_windows(Source(str(text_file(tmp_path, 5))), tokenizer, LENGTH, 1)
    with pytest.raises(UserError, match="text that the model writes"):
        load_text_windows(Source("self"), tokenizer, LENGTH, 1)


def test_no_warning_about_long_texts(
    tmp_path: Path, tokenizer: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        load(options(text_file(tmp_path)), None, tokenizer, cache)
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.records


def test_only_the_beginning_of_a_huge_file_is_read(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_module, "TEXT_BYTES", 100)
    path = text_file(tmp_path, 5000)
    source, demand = Source(str(path)), named_module.Demand(LENGTH, 2, 0)
    found = named_module.named_windows(source, tokenizer, demand, "calibration")
    assert found.rows.shape == (2, LENGTH)
    assert found.tokens < 100
    assert found.description["whole_file"] is False


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WHOLE", 500)
    monkeypatch.setattr(windows, "PART", 200)


@pytest.mark.parametrize(
    ("text", "separator"),
    [("ab cd\n" * 300, "\n"), ("ab cd " * 300, " "), ("abcd" * 300, None), ("x" * 500, None), ("", None)],
)
def test_parts_are_the_text_cut_where_words_end(small_parts: None, text: str, separator: str | None) -> None:
    pieces = windows.parts(text)
    assert "".join(pieces) == text
    assert len(pieces) == (1 if len(text) <= 500 else pytest.approx(len(text) / 200, rel=0.2))
    if separator is not None:
        assert all(100 <= len(piece) <= 200 and piece.startswith(separator) for piece in pieces[1:-1])


def test_a_long_text_is_encoded_in_parts_and_gives_the_same_rows_in_order(
    tmp_path: Path, tokenizer: Any, small_parts: None
) -> None:
    path = text_file(tmp_path, 1000)
    whole = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(whole).view(-1, LENGTH)
    source = Source(str(path))
    assert torch.equal(load_text_windows(source, plain_tokenizer(), LENGTH, 0), rows)
    assert torch.equal(load_text_windows(source, plain_tokenizer(), LENGTH, 12), rows[:12])
    found = named_module.named_windows(source, plain_tokenizer(), named_module.Demand(LENGTH, 12, None), "evaluation")
    assert found.description["parts_encoded"] < found.description["parts"] / 2


def test_a_long_document_is_encoded_in_parts_as_far_as_it_is_needed(tokenizer: Any, small_parts: None) -> None:
    text = numbered(1000)
    whole = plain_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert windows.join(plain_tokenizer(), [text], None).ids == whole
    some = windows.join(plain_tokenizer(), [text], 100).ids
    assert 100 <= len(some) < 200
    assert some == whole[: len(some)]


def test_random_rows_of_a_long_text_come_from_all_over_it(tmp_path: Path, tokenizer: Any, small_parts: None) -> None:
    path = tmp_path / "a.txt"
    # So that eight words in a row are found at one place.
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=5000)))
    source = Source(str(path))

    def rows_of(seed: int) -> named_module.NamedWindows:
        return named_module.named_windows(
            source, plain_tokenizer(), named_module.Demand(LENGTH, 20, seed), "calibration"
        )

    found = rows_of(0)
    assert found.rows.shape == (20, LENGTH)
    assert torch.equal(found.rows, rows_of(0).rows)
    assert not torch.equal(found.rows, rows_of(1).rows)
    assert 20 * LENGTH * 8 <= found.tokens < 5000 / 2
    text = tuple(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])
    places = {text[i : i + LENGTH]: i for i in range(len(text) - LENGTH + 1)}
    starts = sorted(places[tuple(row)] for row in found.rows.tolist())
    assert starts[0] < 1500
    assert starts[-1] > 3500


def test_byte_order_mark_and_line_ends(tmp_path: Path, tokenizer: Any) -> None:
    plain, other = text_file(tmp_path, 40), tmp_path / "b.txt"
    other.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"w5 ", b"w5\r\n"))
    rows = [load_text_windows(Source(str(path)), tokenizer, LENGTH, 0) for path in (plain, other)]
    assert torch.equal(*rows)


def test_too_little_data(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    path = text_file(tmp_path, 30)
    with pytest.raises(UserError, match=r"has 30 tokens.*80 asked.*--tokens.*--use-all-tokens"):
        load(options(path), None, tokenizer, cache)
    assert load(options(path, use_all=True), None, tokenizer, cache).rows.shape == (3, LENGTH)
    with pytest.raises(UserError, match="less than one sequence"):
        load(options(text_file(tmp_path, 3), use_all=True), None, tokenizer, cache)


def test_tokenizer_that_makes_nothing(tmp_path: Path, cache: Path) -> None:
    def silent(text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": []}

    for path in (text_file(tmp_path), jsonl_file(tmp_path, [{"text": "w1"}])):
        with pytest.raises(UserError, match="makes no tokens"):
            load(options(path), None, silent, cache)


# --- rows of documents ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "list.json", "a.parquet"])
def test_formats_of_rows(tmp_path: Path, name: str) -> None:
    tokenizer = plain_tokenizer()
    rows = [{"id": i, "text": f"w{2 * i} w{2 * i + 1}"} for i in range(20)]
    path = tmp_path / name
    lines = "\n".join(json.dumps(row) for row in rows)
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows, indent=1) if name == "list.json" else lines)
    check_sources(options(path))
    found = load_text_windows(Source(str(path)), tokenizer, 6, 2)
    ids = [tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(8)]
    assert found.flatten().tolist() == [*ids[:2], EOS, *ids[2:4], EOS, *ids[4:6], EOS, *ids[6:8], EOS]


def test_half_a_character_is_replaced(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    """JSON that was cut in the middle of an emoji is valid, and no tokenizer takes it."""
    lines = '{"text": "w0 w1 \\ud83d w2 w3 w4 w5 w6 w7"}\n{"messages": [{"role": "user", "content": "\\udc4d w1"}]}\n'
    (tmp_path / "a.jsonl").write_text(lines * 20)
    assert load(options(tmp_path / "a.jsonl"), None, tokenizer, cache).rows.shape == (10, LENGTH)
    assert replace_surrogates("a\ud83d\udc4db\ud83d") == "a\N{THUMBS UP SIGN}b\N{REPLACEMENT CHARACTER}"


def test_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 is not valid JSON"):
        check_sources(options(path))
    path.write_text('{"text": "w1"}\n5\n')
    with pytest.raises(UserError, match="line 2 holds a int"):
        check_sources(options(path))
    path.write_text('{"text": "w1"}\n{"title": "w1"}\n')
    with pytest.raises(UserError, match=r"line 2: no text found in the columns \(title\)"):
        check_sources(options(path))
    path.write_bytes(b'{"text": "w1"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="line 2"):
        check_sources(options(path))


def test_wrong_type_is_named(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    for row in ({"text": 5}, {"messages": "hello"}, {"messages": [{"content": "hello"}]}):
        with pytest.raises(UserError, match="line 1"):
            load(options(jsonl_file(tmp_path, [row])), None, tokenizer, cache)


def test_limit_cuts_between_lines(tmp_path: Path) -> None:
    from lillama_core.data.text.files import json_rows

    path = jsonl_file(tmp_path, [{"text": "w1"}] * 10)
    assert len(list(json_rows(path, None, 40))) == 2
    assert len(list(json_rows(path, 0, None))) == 10


def test_chat_rows_in_all_styles() -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    system = {"role": "system", "content": "be kind"}
    rows: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
        ({"messages": talk}, talk),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, talk[1]]}, talk),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be kind"},
                    {"from": "human", "value": "hello"},
                    {"from": "gpt", "value": "there"},
                ]
            },
            [system, *talk],
        ),
        ({"instruction": "hello", "input": "", "output": "there", "text": "flat"}, talk),
        ({"prompt": "hello", "response": "there"}, talk),
        ({"system_prompt": "be kind", "question": "hello", "response": "there"}, [system, *talk]),
    ]
    for row, expected in rows:
        assert document_of(row, "here") == expected
    joined = document_of({"instruction": "hello", "input": "w1", "output": "there"}, "here")
    assert isinstance(joined, list)
    assert joined[0]["content"] == "hello\n\nw1"
    assert document_of({"content": "w1"}, "here") == "w1"
    assert document_of({"text": None}, "here") is None


def test_chat_has_one_start_token_and_its_end(tmp_path: Path, tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    path = jsonl_file(tmp_path, [{"messages": talk}] * 4)
    found = load_text_windows(Source(str(path)), tokenizer, 6, 2)
    expected = tokenizer.convert_tokens_to_ids(["<s>", "<user>", "hello", "<assistant>", "there", "</s>"])
    assert found.tolist() == [expected, expected]  # neither start nor end is doubled


def test_chat_without_template_is_plain_text() -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    assert render_chat(make_tokenizer(None), talk) == "user: hello\n\nassistant: there"


def test_template_without_system_role_gets_it_in_the_question() -> None:
    strict = make_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE)
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert render_chat(strict, talk) == "<s><user> be kind\n\nhello"


def test_template_that_refuses(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hello " * 9}]
    picky = make_tokenizer("{% if 'w1' in messages[0]['content'] %}{{ raise_exception('odd') }}{% endif %}" + TEMPLATE)
    bad = [{"role": "user", "content": "w1"}]
    path = jsonl_file(tmp_path, [{"messages": bad}, {"messages": talk}])
    demand = named_module.Demand(LENGTH, 1, None)
    found = named_module.named_windows(Source(str(path)), picky, demand, "calibration")
    assert found.description["refused_by_chat_template"] == 1
    path = jsonl_file(tmp_path, [{"messages": bad}])
    with pytest.raises(UserError, match=r"refuses every conversation \(odd\)"):
        named_module.named_windows(Source(str(path)), picky, demand, "calibration")


def test_date_in_a_template_stands_still() -> None:
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }} {{ date_string }}")
    assert render_chat(dated, [{"role": "user", "content": "hello"}]) == "26 Jul 2024 26 Jul 2024"


# --- datasets ---


class FakeDataset:
    def __init__(self, rows: list[dict[str, Any]], shuffled: bool = False) -> None:
        self.rows, self.shuffled = rows, shuffled

    def shuffle(self, seed: int) -> FakeDataset:
        return FakeDataset(self.rows[::-1], True)

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_dataset_by_name(tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fake(repo: str, config: str | None, **settings: Any) -> FakeDataset:
        asked.append((repo, config, settings["split"]))
        return FakeDataset([{"text": numbered(20)}] * 9)

    monkeypatch.setattr("datasets.load_dataset", fake)
    data = load(options("org/name:small:dev"), None, tokenizer, cache)
    assert asked == [("org/name", "small", "dev")]
    assert data.rows.shape == (10, LENGTH)
    assert data.description["org/name:small:dev"]["kind"] == "dataset"
    asked.clear()
    # Running text in lines: joined by blank lines and evaluated on its test split.
    found = load_text_windows(Source("wikitext2"), tokenizer, LENGTH, 0)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert found.shape == (22, LENGTH)
    assert EOS not in found


def test_dataset_with_a_script_is_taken_converted(tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(repo: str, config: str | None, **settings: Any) -> FakeDataset:
        if settings.get("revision") != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported")
        return FakeDataset([{"text": numbered(100)}])

    monkeypatch.setattr("datasets.load_dataset", fake)
    assert load(options("redpajama"), None, tokenizer, cache).rows.shape == (10, LENGTH)


def test_dataset_that_cannot_be_had(tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*args: Any, **settings: Any) -> FakeDataset:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fake)
    with pytest.raises(UserError, match="dataset org/name:train cannot be loaded: no route to host") as caught:
        load(options("org/name"), None, tokenizer, cache)
    assert "\n" not in str(caught.value)


# --- the model's own text ---


def test_every_other_row_is_opened_by_any_token(tokenizer: Any, cache: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # what it writes follows from what it read
    options = CalibrationOptions(tokens=190 * LENGTH, sequence_length=LENGTH)
    behind, bare = (load(options, model, reader, cache).rows for reader in (tokenizer, plain_tokenizer()))
    assert (behind[:, 0] == BOS).all()
    assert len(behind[::2, 1].unique()) == 1
    assert len(behind[1::2, 1].unique()) > 30
    assert (bare[::2, 0] == BOS).all()
    assert (bare[::2, 1] == behind[0, 1]).all()
    assert len(bare[1::2, 0].unique()) > 30
    # One and the same token is drawn for a row, wherever it stands; what follows it is the model's.
    assert torch.equal(bare[1::2, 0], behind[1::2, 1])
    following = {(int(first), int(second)) for first, second in bare[1::2, :2]}
    assert len(following) == len({first for first, _ in following})


def test_own_text_is_full_rows_from_the_start_token(model: Any, tokenizer: Any, cache: Path) -> None:
    data = load(CalibrationOptions(tokens=190 * LENGTH, sequence_length=LENGTH), model, tokenizer, cache)
    assert data.rows.shape == (190, LENGTH)
    assert (data.rows[:, 0] == BOS).all()
    ends = (data.rows[:, 1:-1] == EOS).nonzero()
    assert len(ends)  # kept, and writing went on: a stopped row would be padded with one token
    following = data.rows[ends[:, 0], ends[:, 1] + 2]
    assert len(set(following.tolist())) > 1
    assert model.calls == 6
    assert data.description["self"]["kind"] == "self"


def test_own_text_ignores_the_generation_settings(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    chosen = options(tokens=32 * LENGTH)
    plain = load(chosen, model, tokenizer, tmp_path / "1")
    settings = model.generation_config
    settings.update(top_k=1, temperature=0.1, repetition_penalty=2.0, eos_token_id=list(range(200)))
    other = load(chosen, model, tokenizer, tmp_path / "2")
    assert torch.equal(plain.rows, other.rows)
    assert model.generation_config is settings


def test_own_text_leaves_the_world_as_it_was(model: Any, tokenizer: Any, cache: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(options(), model, tokenizer, cache)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_own_text_depends_on_the_seed_alone(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    one = load(options(), model, tokenizer, tmp_path / "1")
    torch.rand(7)
    two = load(options(), model, tokenizer, tmp_path / "2")
    three = load(options(seed=1), model, tokenizer, tmp_path / "2")
    assert torch.equal(one.rows, two.rows)
    assert one.sha256 != three.sha256


def test_longer_own_text_begins_with_the_shorter(model: Any, tokenizer: Any, cache: Path) -> None:
    short = load(options(tokens=40 * LENGTH), model, tokenizer, cache)
    assert model.calls == 2
    long = load(options(tokens=70 * LENGTH), model, tokenizer, cache)
    assert model.calls == 3
    assert torch.equal(long.rows[:40], short.rows)


def test_own_text_is_read_from_the_cache(model: Any, tokenizer: Any, cache: Path) -> None:
    first = load(options(), model, tokenizer, cache)
    again = load(options(), model, tokenizer, cache)
    assert model.calls == 1
    assert torch.equal(first.rows, again.rows)
    load(options(), model, tokenizer, cache, model_fingerprint="another")
    load(options(tokens=96, sequence_length=16), model, tokenizer, cache)
    assert model.calls == 3
    assert model.static == 3  # of which none had to be repeated without
    # In half precision a copy of the model writes, and what it writes is cached for itself.
    load(options(), model, tokenizer, cache, autocast_dtype=torch.bfloat16)
    assert model.calls == 3
    assert len(list(cache.rglob("*.safetensors"))) == 4
    assert not list(cache.rglob("*.tmp"))


def test_hostile_cache_files_are_rebuilt(model: Any, tokenizer: Any, cache: Path) -> None:
    first = load(options(), model, tokenizer, cache)
    (path,) = cache.rglob("*.safetensors")
    genuine = path.read_bytes()
    changed = bytearray(genuine)
    changed[-8] ^= 1
    for calls, content in enumerate((b"", b"junk", genuine[:-9], bytes(changed), b"\xff" * 2**20), start=2):
        path.write_bytes(content)
        assert torch.equal(load(options(), model, tokenizer, cache).rows, first.rows)
        assert model.calls == calls
    save_file({"rows": torch.full((32, LENGTH), 10**6)}, path)
    assert torch.equal(load(options(), model, tokenizer, cache).rows, first.rows)
    path.unlink()
    path.mkdir()
    assert torch.equal(load(options(), model, tokenizer, cache).rows, first.rows)


def test_unwritable_cache_does_not_stop_the_run(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.touch()
    assert load(options(), model, tokenizer, obstacle).rows.shape == (10, LENGTH)


def test_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LILLAMA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LILLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lillama"


def test_model_without_static_cache_writes_too(tokenizer: Any, cache: Path) -> None:
    class Growing(CountingModel):
        _can_compile_fullgraph = False

    class Deceiving(CountingModel):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if "past_key_values" in kwargs:
                raise IndexError("static cache does not fit")
            return super().generate(*args, **kwargs)

    rows = [
        load(options(), make_model(kind), tokenizer, cache / kind.__name__).rows
        for kind in (CountingModel, Growing, Deceiving)
    ]
    assert torch.equal(rows[1], rows[2])
    # The cache makes no difference but for rounding, which seldom changes a draw.
    assert (rows[0] == rows[1]).all(dim=1).float().mean() >= 0.8


def test_start_token_when_there_is_none(tokenizer: Any, cache: Path) -> None:
    class Nothing:
        bos_token_id = None
        eos_token_id = None

    end_only = Nothing()
    end_only.eos_token_id = EOS  # type: ignore[assignment]
    model = make_model(bos_token_id=None)
    assert (load(options(), model, end_only, cache).rows[::2, 0] == EOS).all()
    model = make_model(bos_token_id=None, eos_token_id=None)
    one = load(options(), model, Nothing(), cache / "1").rows
    two = load(options(), model, Nothing(), cache / "2").rows
    assert len(set(one[:, 0].tolist())) > 1
    assert torch.equal(one, two)


def test_models_that_cannot_write(tokenizer: Any, cache: Path) -> None:
    with pytest.raises(UserError, match="LlamaModel cannot generate text"):
        load(options(), make_model(LlamaModel), tokenizer, cache)
    model = make_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(UserError, match="encoder's input"):
        load(options(), model, tokenizer, cache)


def test_sequences_longer_than_the_model_knows(model: Any, tokenizer: Any, cache: Path) -> None:
    with pytest.raises(UserError, match="65 is more than the 64 positions"):
        load(options(tokens=65, sequence_length=65), model, tokenizer, cache)


def test_broken_model_is_named(model: Any, tokenizer: Any, cache: Path) -> None:
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(LillamaError, match="no valid probabilities"):
        load(options(), model, tokenizer, cache)


# --- the mix ---


def test_half_is_the_models_own_by_default(model: Any, tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    first, second = text_file(tmp_path), text_file(tmp_path, name="b.txt")
    chosen = options(first, f"{second}@3", tokens=16 * LENGTH, self_share=0.5)
    data = load(chosen, model, tokenizer, cache)
    counts = {name: found["rows"] for name, found in data.description.items()}
    assert counts == {"self": 8, str(first): 2, str(second): 6}
    assert len(data.rows) == 16


def test_every_beginning_of_the_rows_holds_about_the_mix() -> None:
    order = [name for name, _ in interleaved({"self": 8, "a.txt": 2, "b.txt": 6})]
    assert len(order) == 16
    for prefix in (4, 8, 12):
        assert abs(order[:prefix].count("self") - prefix / 2) <= 1
        assert abs(order[:prefix].count("b.txt") - prefix * 3 / 8) <= 1


def test_weights_decide_when_self_is_named(model: Any, tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    chosen = options("self@1", f"{text_file(tmp_path)}@3", tokens=8 * LENGTH, self_share=0.5)
    assert load(chosen, model, tokenizer, cache).description["self"]["rows"] == 2


def test_share_of_zero_never_asks_the_model(model: Any, tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    load(options(text_file(tmp_path), self_share=0.0), model, tokenizer, cache)
    assert model.calls == 0


def test_source_that_would_get_nothing(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    chosen = options(f"{text_file(tmp_path)}@0.001", text_file(tmp_path, name="b.txt"))
    with pytest.raises(UserError, match=r"a\.txt gets none of the 10 rows"):
        load(chosen, None, tokenizer, cache)


def test_tokenizer_of_another_model(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="knows only 20"):
        load(options(text_file(tmp_path)), make_model(vocab_size=20), tokenizer, cache)


def test_named_data_fails_before_the_model_is_asked(model: Any, tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="30 tokens"):
        load(options(text_file(tmp_path, 30), self_share=0.5, tokens=160), model, tokenizer, cache)
    assert model.calls == 0


def test_a_json_list_is_read_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join('{"text": "words"}' for _ in range(50)) + "]")
    assert len(list(files.json_rows(path, None, 10))) == 50
    monkeypatch.setattr(files, "LIST_BYTES", 400)
    with pytest.raises(UserError, match=r"is a JSON list of more than 0 MiB, .* write one object a line"):
        list(files.json_rows(path, None, 10))


def test_the_copy_that_writes_keeps_its_tables_exact() -> None:
    model = make_model(LlamaForCausalLM).to(torch.bfloat16)
    # As a run has it: what is not in a block is in fp32.
    model.lm_head.weight.data = model.lm_head.weight.data.float()
    writer = sampling.converted(model, torch.bfloat16)
    assert {p.dtype for p in writer.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32
    # One copy of what has the dtype already.
    assert writer.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    rotary = make_model(LlamaForCausalLM).model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    model = make_model(LlamaForCausalLM)
    assert torch.equal(sampling.converted(model, torch.bfloat16).model.rotary_emb.inv_freq, rotary)
    assert model.lm_head.weight.dtype == torch.float32
