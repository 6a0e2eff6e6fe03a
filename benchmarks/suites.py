"""What the suites run on: models, each with the data that it is calibrated and measured on."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama_benchmarks import arena
from lillama_core.data.modality import modality_of
from lillama_core.errors import UserError, nearest

DATA = Path(__file__).parent / "data"
CALIBRATION_TEXT = DATA / "wikitext2-valid.txt"
EVALUATION_TEXT = DATA / "wikitext2-test.txt"
LOCAL_EVALUATIONS = arena.local(EVALUATION_TEXT, DATA / "tales-grimm.txt", DATA / "code-lillama.txt")
"""Of the suite ``arena-local``."""
SYNTHETIC_SPEECH = DATA / "speech" / "synthetic"

made_here = contextlib.ExitStack()
"""What was made for this process alone; closed at its end, or before, where a process has no say in its end."""
atexit.register(made_here.close)

Options = Mapping[str, Any]
"""Options of a command by the names of their fields; the command line's have dashes."""
ANY_MODEL: tuple[Options, ...] = ({"windows": 40, "limit": 120},)
"""What a model of the user's is measured on where the suite does not say: what its modality takes by itself."""


@dataclass(frozen=True)
class SuiteModel:
    """A model of a suite."""

    name: str
    fetch: Callable[[], Path]
    """The model's directory, made or downloaded at the first call."""
    calibration: tuple[Path | str, ...] = ()
    evaluations: tuple[Options, ...] = ({},)
    """Options of ``lillama evaluate``, one run of it each, with an `arena.LABEL` where several measure one thing on
    other data; where two have one name, the first counts."""
    compress: Options = field(default_factory=dict)
    """Options of every compression of this model, over those of the method."""
    on_request: bool = False
    """Whether it takes part only when it is named."""
    directory: Path | None = None
    """Of a model of the user's, which no suite knows by its name."""
    identity: Callable[[], str] = str
    """What tells the model from others that had its name: results of another one are not reused."""

    def check(self) -> None:
        """Raise UserError when data of this model is missing."""
        data = [*self.calibration, *(e["data"] for e in self.evaluations if "data" in e)]
        for path in data:
            if isinstance(path, Path) and not path.exists():
                raise UserError(
                    f"model {self.name!r} needs {str(path)!r}, which is not there; the suite's data comes with the"
                    " repository, not with the package"
                )


@dataclass(frozen=True)
class Suite:
    """Models, and what is done to them when the user does not say."""

    name: str
    models: Callable[[Path], list[SuiteModel]]
    """Takes a folder in which the suite may keep files of its own."""
    methods: tuple[str, ...]
    """Empty: all there are."""
    reductions: tuple[float, ...]
    jobs: int = 1
    """Models worked on at a time; more than one spoils what is measured of speed."""
    calibration: tuple[Path | str, ...] = ()
    """Of models of the user's."""
    evaluations: tuple[Options, ...] = ANY_MODEL
    """Likewise."""
    retained: tuple[str, ...] = ()
    """Metrics of which is shown what a compressed model keeps of the dense one's, each with the same weight."""
    protocol: str = ""
    """How things are measured, for whoever reads the results."""


def _text(windows: int = 40, limit: int = 120, data: Path = EVALUATION_TEXT) -> tuple[Options, ...]:
    return ({"data": data, "windows": windows, "limit": limit},)


def _held_out(folder: Path) -> Path:
    """The articles that the zoo's small models were not trained on, as a file."""
    from lillama_benchmarks.zoo.texts import held_out_text

    path = folder / "wikitext2-held-out.txt"
    # Where the data is not there, the check of the models says so.
    if EVALUATION_TEXT.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Put there whole: another process may be reading it.
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, delete=False) as unfinished:
            unfinished.write(held_out_text())
        Path(unfinished.name).replace(path)
    return path


def cross_architecture(folder: Path) -> list[SuiteModel]:
    """The zoo, one trained model of each architecture; empty outside of a clone of the repository."""
    if importlib.util.find_spec("lillama_benchmarks.zoo") is None:
        return []
    from lillama_benchmarks import zoo
    from lillama_core.data.shipped import SPEECH_SETS

    held_out = _held_out(folder)
    speech: tuple[Options, ...] = (
        {"data": SYNTHETIC_SPEECH / "evaluation" / "manifest.jsonl"},
        {"data": Path(SPEECH_SETS["read"])},
    )
    data: dict[str, tuple[tuple[Path | str, ...], tuple[Options, ...]]] = {
        "mamba-tiny": ((CALIBRATION_TEXT,), _text(data=held_out)),
        "falcon-mamba-tiny": ((CALIBRATION_TEXT,), _text(data=held_out)),
        "whisper-tiny.en": ((SYNTHETIC_SPEECH / "calibration" / "manifest.jsonl",), speech),
    }

    # All the recordings that there are.
    options: dict[str, Options] = {"whisper-tiny.en": {"samples": 210}}

    def made(name: str) -> SuiteModel:
        calibration, evaluations = data.get(name, ((CALIBRATION_TEXT,), _text()))
        return SuiteModel(
            name,
            lambda: zoo.fetch(name),
            calibration,
            evaluations,
            options.get(name, {}),
            identity=lambda: f"revision {revisions[name]}",
        )

    revisions = {model.name: model.revision for model in zoo.models()}
    found = [made(name) for name in revisions]
    whisper = made("whisper-tiny.en")
    encoder = dataclasses.replace(
        whisper, name="whisper-tiny.en-encoder", compress={**whisper.compress, "stacks": ("encoder",)}, on_request=True
    )
    return [*found, encoder]


def smoke(_: Path) -> list[SuiteModel]:
    """A tiny random model of the first type of every registered architecture."""
    from lillama_registry import registry
    from lillama_testing.tiny import MATERIALS, QUICK, make_tiny_model

    quick = {**QUICK, "steps": 1, "tokens": 512, "samples": 8}
    evaluations: tuple[Options, ...] = ({"sequence_length": 32, "windows": 2, "limit": 2},)

    def made(architecture: Any) -> SuiteModel:
        model_type = architecture.model_types[0]

        def fetch() -> Path:
            # Anew in each process: what makes it may have changed.
            if not made_at:
                folder = tempfile.TemporaryDirectory(prefix="lillama-tiny-", ignore_cleanup_errors=True)
                path = Path(made_here.enter_context(folder))
                make_tiny_model(architecture, model_type, path)
                made_at.append(path)
            return made_at[0]

        made_at: list[Path] = []

        materials = MATERIALS.get(modality_of(architecture).name)
        calibration = () if materials is None else materials.calibration
        options = {**quick, "stacks": tuple(architecture.stacks)}
        return SuiteModel(f"tiny-{model_type}", fetch, calibration, evaluations, options)

    first: dict[str, Any] = {}
    for architecture in registry().architectures:
        if architecture.model_types:
            first.setdefault(architecture.name, architecture)
    return [made(architecture) for architecture in first.values()]


def arena_local(_: Path) -> list[SuiteModel]:
    """SmolLM2; empty outside of a clone of the repository."""
    if importlib.util.find_spec("lillama_benchmarks.zoo") is None:
        return []
    from lillama_benchmarks import zoo

    name = "smollm2-135m"
    (revision,) = (model.revision for model in zoo.models() if model.name == name)
    return [
        SuiteModel(
            name,
            lambda: zoo.fetch(name),
            (CALIBRATION_TEXT,),
            LOCAL_EVALUATIONS,
            identity=lambda: f"revision {revision}",
        )
    ]


SUITES = {
    "cross-architecture": Suite("cross-architecture", cross_architecture, (), (0.2,)),
    "smoke": Suite("smoke", smoke, ("fast",), (0.2,), jobs=2),
    "arena": Suite(
        "arena",
        lambda _: [],
        ("fast", "default"),
        (0.2, 0.4),
        calibration=("wikitext2",),
        evaluations=arena.HUB,
        retained=arena.HUB_RETAINED,
        protocol=arena.HUB_PROTOCOL,
    ),
    "arena-local": Suite(
        "arena-local",
        arena_local,
        ("fast", "default"),
        (0.2, 0.4),
        calibration=(CALIBRATION_TEXT,),
        evaluations=LOCAL_EVALUATIONS,
        retained=arena.retained(LOCAL_EVALUATIONS, arena.LOCAL_TASKS),
        protocol=arena.LOCAL_PROTOCOL,
    ),
}


def choose_models(suite: Suite, names: tuple[str, ...], folder: Path) -> list[SuiteModel]:
    """The suite's models of these names, all when there are none; a directory is a model too.

    A model of the user's is calibrated and measured as its modality does by itself. Raises UserError for an unknown
    name, and for data that is missing.
    """
    known = {m.name: m for m in suite.models(folder)}
    if not known and not (names and all(Path(name).is_dir() for name in names)):
        if suite is SUITES["arena"]:
            raise UserError(
                "suite 'arena' has no models of its own: name directories of models with --models, or take --suite"
                " arena-local, which needs no hub"
            )
        raise UserError(
            f"the models of suite {suite.name!r} come with the repository, not with the package: work in a clone of it,"
            " or name directories of models with --models"
        )
    chosen = list(_named(suite, names, known)) if names else [m for m in known.values() if not m.on_request]
    for model in chosen:
        model.check()
        if sum(m.name == model.name for m in chosen) > 1:
            raise UserError(f"two models are called {model.name!r}, and so would their results be; rename a directory")
    return chosen


def _fingerprint(path: Path) -> str:
    from lillama_core.models.source import locate, model_fingerprint

    try:
        return model_fingerprint(locate(str(path)))
    except (OSError, UserError):
        # What is wrong with it, its cells will say.
        return "unreadable"


def _named(suite: Suite, names: tuple[str, ...], known: dict[str, SuiteModel]) -> Iterator[SuiteModel]:
    for name in names:
        if name in known:
            yield known[name]
        elif Path(name).is_dir():
            path = Path(name).resolve()
            yield SuiteModel(
                path.name,
                functools.partial(Path, path),
                suite.calibration,
                suite.evaluations,
                directory=path,
                identity=functools.partial(_fingerprint, path),
            )
        else:
            raise UserError(
                f"no model named {name!r} in suite {suite.name!r} (there are: {', '.join(known)}),"
                f" and no directory{nearest(name, list(known))}"
            )
