"""``dense``: the factors multiplied out, an ordinary directory of transformers."""

from __future__ import annotations

from lillama_core.exporting.base import Agreement, Exporter, ExportJob
from lillama_core.exporting.fresh import PLAIN_CHECK, allowed, run_without_lillama, write_probe
from lillama_core.exporting.model import CompressedModel


class DenseExporter(Exporter):
    """The factors multiplied out: a directory of the size of the original, for whatever takes the original."""

    name = "dense"

    def write(self, model: CompressedModel, job: ExportJob) -> None:
        model.write_dense(job.folder, job.scratch, job.dtype, job.progress)
        model.copy_small_files(job.folder)

    def verify(self, model: CompressedModel, job: ExportJob) -> list[Agreement]:
        inputs = model.inputs()
        probe = write_probe(job.scratch / "probe.safetensors", inputs, {"logits": model.output(inputs)})
        trust = ["--trust-remote-code"] if model.source.trust_remote_code else []
        found = run_without_lillama(PLAIN_CHECK, job.scratch, job.folder, probe, model.architecture.auto_class, *trust)
        return [Agreement("logits", found["logits"], allowed(model, job.dtype or model.dtype))]

    def usage(self, model: CompressedModel) -> str:
        auto_class = model.architecture.auto_class
        return (
            "The low-rank factors are multiplied out: the directory has the size of the original model, and is read by"
            " whatever reads that one. What the compression has lost stays lost; what it has saved is in the compressed"
            " directory only.\n\n"
            f"```python\nfrom transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained(".", dtype="auto")\n```\n'
        )
