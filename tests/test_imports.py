"""What importing costs: neither torch nor transformers before something needs them; the format is known either way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

import lillama_core

HEAVY = ("torch", "transformers", "datasets", "numpy", "scipy", "matplotlib", "safetensors")


def run(code: str, *arguments: str | Path, **changes: str) -> str:
    """Standard output of ``code`` in a fresh process, which must write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment(**changes), "PYTHONWARNINGS": "ignore::DeprecationWarning"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = f"print([name for name in {HEAVY!r} if name in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import lillama_core",
        "from lillama_core import Architecture, Evaluation, UserError, hookimpl, language_model_evaluation",
        "import lillama_registry; found = lillama_registry.registry(); assert not found.failures, found.failures;"
        " found.names('losses'); found.architectures_for('llama')",
        "import lillama_testing, lillama_benchmarks",
    ],
)
def test_declaring_loads_nothing_heavy(code: str) -> None:
    assert run(f"import sys\n{code}\n{LOADED}") == "[]"


@pytest.mark.parametrize(
    ("code", "seconds"),
    [("import lillama_core", 0.3), ("from lillama_registry import registry; registry()", 0.6)],
)
def test_importing_costs_little(code: str, seconds: float) -> None:
    # Processor time, and the best of three: others use the machine as well.
    spent = min(float(run(f"{code}\nimport time\nprint(time.process_time())")) for _ in range(3))
    assert spent < seconds


def test_every_public_name_is_there() -> None:
    for name in lillama_core.__all__:
        assert getattr(lillama_core, name) is not None
        assert name in dir(lillama_core)
    with pytest.raises(AttributeError, match="'lillama_core' has no attribute 'comprss'"):
        _ = lillama_core.comprss  # type: ignore[attr-defined]


ALONE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "") != "lillama_startup"]
"""
"""Takes out what reads compressed models in any program, where lillama is installed."""
LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(m).__name__.endswith("Linear") and type(m).__name__ != "Linear" for m in model.modules()) > 0)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import lillama_core\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport lillama_core",
        "import transformers\nimport lillama_core\nfrom transformers import AutoModelForCausalLM",
        "import transformers.quantizers.auto\nimport lillama_core\nfrom transformers import AutoModelForCausalLM",
        "import lillama_core.output.quantizer\nfrom transformers import AutoModelForCausalLM",
        "import lillama_core, importlib\nimportlib.reload(lillama_core)\nimport transformers.quantizers.auto as auto\n"
        "importlib.reload(auto)\nimportlib.reload(lillama_core)\nfrom transformers import AutoModelForCausalLM",
    ],
)
def test_transformers_loads_a_compressed_model_in_either_order_of_imports(imports: str, compressed: Path) -> None:
    assert run(f"{ALONE}{imports}\n{LOAD}", compressed) == "True"


def test_importing_in_several_threads_at_once_registers_once(compressed: Path) -> None:
    code = """
import importlib, sys, threading
sys.setswitchinterval(1e-5)
errors = []
def import_(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        errors.append(error)
names = ["lillama_core", "transformers.quantizers", "transformers.modeling_utils", "lillama_core", "transformers"]
threads = [threading.Thread(target=import_, args=(name,)) for name in names * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
import lillama_core
from lillama_core.transformers_hook import _Finder
assert sum(isinstance(finder, _Finder) for finder in sys.meta_path) == 1
from transformers import AutoModelForCausalLM
"""
    assert run(ALONE + code + LOAD, compressed) == "True"
    assert run("import sys" + code + LOAD, compressed) == "True"


def test_an_import_by_another_thread_is_waited_for(compressed: Path) -> None:
    code = f"""{ALONE}
import importlib.machinery, threading, time
on_its_way = threading.Event()
class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "transformers.quantizers.auto":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        on_its_way.set()
        time.sleep(0.5)
        return spec
sys.meta_path.insert(0, Slow)
thread = threading.Thread(target=importlib.import_module, args=("transformers.quantizers.auto",))
thread.start()
on_its_way.wait()
import lillama_core
from transformers import AutoModelForCausalLM
"""
    assert run(code + LOAD, compressed) == "True"


def test_a_tool_sees_the_module_as_without_the_hook() -> None:
    code = f"""{ALONE}
import lillama_core, inspect
import transformers.quantizers.auto as auto
assert type(auto.__loader__).__name__ == "SourceFileLoader", auto.__loader__
assert auto.__spec__.loader is auto.__loader__
assert "register_quantizer" in inspect.getsource(auto)
"""
    assert run(code) == ""
    assert run(code.replace("import lillama_core, inspect", "import inspect").replace(ALONE, "")) == ""


def test_transformers_is_usable_where_the_format_cannot_be_registered() -> None:
    # Half an installation: whoever wants a tokenizer alone must not be stopped.
    code = f"""{ALONE}
sys.modules["lillama_core.formats"] = None
import lillama_core, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto as auto
(said,) = [str(w.message) for w in caught if "lillama" in str(w.message)]
assert "cannot load models compressed by lillama" in said and "lillama_core.formats" in said, said
assert "lillama" not in auto.AUTO_QUANTIZER_MAPPING
"""
    assert run(code) == ""
