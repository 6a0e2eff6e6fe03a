"""``--evaluate`` and ``--push``: a result that is measured and uploaded, to a server of the test's own."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import WEIGHTS_ONLY, Ended, environment, run_process
from huggingface_hub import ModelCard

import lillama_core

Cli = Callable[..., Ended]

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzabcdefgh"


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload needs: repositories with their files, for whoever has the token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuses = ""
        """Part of the path of requests that are answered with 403, and all that was asked, the token too."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST  # noqa: N815  as http.server calls it

    def _answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/storage/"):
            return self._send({"error": "Invalid credentials"}, 401)
        if hub.refuses and hub.refuses in path:
            return self._send({"error": f"not for you, who said {self.headers['Authorization']}"}, 403)
        if path == "/api/whoami-v2":
            return self._send({"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.created.append(asked)
            hub.repositories.setdefault(name, {})
            return self._send({"url": f"{hub.url}/{name}", "name": name})
        if path.startswith("/storage/"):
            hub.large[path.removeprefix("/storage/")] = body
            return self._send({})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": objects})
        if "/preupload/" in path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._send({"files": modes})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            files = hub.repositories[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            return self._send({"success": True, "commitOid": "ab" * 20, "commitUrl": f"{hub.url}/{name}/commit/1"})
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            return self._send({"id": name, "sha": "cd" * 20, "siblings": []})
        return self._send({"error": f"no {path}"}, 404)

    def _send(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def reaching(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process for which the test's server is the Hub."""
    return environment(
        HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"
    )


def test_a_result_is_measured_and_pushed(
    tiny_model: Path, calibration_text: Path, hub: Hub, reaching: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    (tiny_model / "README.md").write_text("---\nlicense: mit\n---\n")
    done = run_process(
        *("compress", tiny_model, "-o", tmp_path / "small", "--calibration", calibration_text, *WEIGHTS_ONLY),
        *("--evaluate", "--push", "me/small", "--private"),
        fresh=True,
        env=reaching,
        umask=0o022,
    )
    assert done.status == 0, done
    assert done.stdout.splitlines()[-1] == f"pushed      {hub.url}/me/small"
    assert TOKEN not in done.stdout + done.stderr
    (created,) = hub.created
    assert (created["name"], created.get("visibility")) == ("small", "private")
    # All of the directory is there, byte by byte, and whoever may read it may read all of it.
    files = {p.name: p for p in (tmp_path / "small").iterdir()}
    assert hub.repositories["me/small"] == {name: path.read_bytes() for name, path in files.items()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o644}
    assert not [name for name, path in files.items() if TOKEN.encode() in path.read_bytes()]
    record = json.loads(files["lillama.json"].read_text())
    measured = {m["name"]: m["value"] for m in record["evaluation"]["compressed"]}
    assert measured["footprint/parameters"] == record["parameters"]["parameters_after"]
    card = ModelCard.load(files["README.md"])
    assert card.data.license == record["license"]["license"] == "mit"
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["lillama", "perplexity"] == measured["perplexity"]
    assert found["calibration", "perplexity"] == record["fidelity"]["perplexity_after"]
    assert "| `perplexity` |" in card.text


@pytest.mark.parametrize(
    ("repository", "changes", "expected"),
    [
        ("me/sm all", {}, "a repository is OWNER/NAME"),
        ("a/b/c", {}, "a repository is OWNER/NAME"),
        ("me/small", {"HF_HUB_OFFLINE": "1"}, "switched off by HF_HUB_OFFLINE"),
        ("me/small", {"HF_TOKEN": ""}, "there is no token; run 'hf auth login'"),
        ("me/small", {"HF_TOKEN": TOKEN[::-1]}, "the Hub does not know this token"),
        ("me/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_stands_against_a_push_is_told_first(
    reaching: dict[str, str], tmp_path: Path, repository: str, changes: dict[str, str], expected: str
) -> None:
    """Before anything is looked at: there is no model."""
    done = run_process(
        "compress", "./none", "-o", tmp_path / "o", "--push", repository, fresh=True, env={**reaching, **changes}
    )
    assert f"--push {repository!r}: " in done.error
    assert expected in done.error
    assert TOKEN not in done.error
    assert TOKEN[::-1] not in done.error


def test_a_push_that_fails_leaves_the_result_and_keeps_the_token(
    compressed: Path, hub: Hub, reaching: dict[str, str], tmp_path: Path
) -> None:
    hub.refuses = "/preupload/"
    done = run_process(
        *("quantize", compressed, "-o", tmp_path / "bits", "--push", "me/bits"), fresh=True, env=reaching
    )
    assert done.status == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"lillama: error: '{tmp_path / 'bits'}' is complete, but was not pushed to 'me/bits': ")
    assert "not for you, who said Bearer …" in last
    assert last.endswith(f"'hf upload me/bits {tmp_path / 'bits'}' does it later")
    assert TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "bits" / "model.safetensors").is_file()
    assert hub.repositories == {"me/bits": {}}


def test_python_pushes_too(compressed: Path, hub: Hub, reaching: dict[str, str], tmp_path: Path) -> None:
    program = f"import lillama_core; print(lillama_core.push({str(compressed)!r}, 'me/again', private=True))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=reaching, check=True)
    assert done.stdout == f"{hub.url}/me/again\n"
    assert hub.repositories["me/again"].keys() == {p.name for p in compressed.iterdir()}
    with pytest.raises(lillama_core.UserError, match="is no directory that lillama has made"):
        lillama_core.push(tmp_path, "me/again")


def test_private_without_push_does_nothing(run_cli: Cli, tmp_path: Path) -> None:
    ended = run_cli("compress", tmp_path, "-o", tmp_path / "o", "--private")
    assert "--private does nothing without --push" in ended.error


def test_an_evaluation_is_of_what_is_published(run_cli: Cli, tiny_model: Path) -> None:
    """Not of a model that is rounded afterwards."""
    ended = run_cli("compress", tiny_model, "-o", tiny_model.parent / "o", "--target-size", "50kB", "--evaluate")
    assert "--evaluate does not go with --target-size: run 'lillama evaluate'" in ended.error


def test_an_interrupted_evaluation_leaves_a_model_that_is_complete(
    run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lillama_core.pipeline.evaluate_result.compare_in", stop)
    output = tmp_path / "o"
    ended = run_cli(
        "compress", tiny_model, "-o", output, "--calibration", calibration_text, *WEIGHTS_ONLY, "--evaluate"
    )
    assert ended.status == 1
    said = f"interrupted; '{output}' is complete but for that; 'lillama evaluate {output}' measures it"
    assert ended.stderr.splitlines()[-1] == f"lillama: error: {said}"
    assert not output.with_name("o.partial").exists()
    assert (output / "lillama.json").exists()


def test_a_streamed_run_is_measured_block_by_block(
    run_cli: Cli, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    ended = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "o", "--calibration", calibration_text, *WEIGHTS_ONLY),
        *("--stream", "--evaluate"),
    )
    assert ended.status == 0
    assert "speed: left out, it needs the whole model in memory" in ended.stderr
    record = json.loads((tmp_path / "o" / "lillama.json").read_text())
    names = {m["name"].split("/")[0] for m in record["evaluation"]["compressed"]}
    assert names - {"accuracy"} == {"perplexity"}
