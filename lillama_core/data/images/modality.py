"""Images for models whose input is ``pixel_values``."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.comparable import ComparableModality, EvaluationRows
from lillama_core.data.images.files import choose_images, files_sha256, find_images, need_pillow, read_pixels
from lillama_core.data.modality import Inputs, SampleRequest, Samples
from lillama_core.data.sources import SELF, Source
from lillama_core.errors import UserError, is_out_of_memory, one_line
from lillama_core.recipe.model import Recipe
from lillama_core.system.regular import check_folder

if TYPE_CHECKING:
    from lillama_core.evaluation.base import EvaluationOptions

if TYPE_CHECKING:
    from lillama_core.models.source import ModelSource

IMAGES_A_BATCH = 8


class Images(ComparableModality):
    """Folders of images, as the model's own image processor makes them."""

    name = "images"
    processor_class = "AutoImageProcessor"
    feeds = "pixel_values, images"
    calibrates = "a folder of images (--calibration DIR, --samples N)"

    def check(self, recipe: Recipe) -> None:
        need_pillow()
        choose_images(_folders(recipe.calibration), recipe.samples, recipe.seed, recipe.use_all_tokens)
        if recipe.samples < 2 * recipe.batch_size:
            raise UserError(
                f"{recipe.samples} images are too few: at least two batches of {recipe.batch_size} are needed;"
                " raise --samples or lower --batch-size"
            )

    def load_processor(self, source: ModelSource, spec: str | None) -> Any:
        from transformers import AutoImageProcessor

        need_pillow()
        check_folder(Path(spec or source.location))
        try:
            if spec is None:
                return AutoImageProcessor.from_pretrained(source.location, **source.extra)
            return AutoImageProcessor.from_pretrained(spec, trust_remote_code=source.trust_remote_code)
        except Exception as error:
            where = spec or source.spec
            raise UserError(
                f"no image processor found at {where!r} ({one_line(error)}); name one with --tokenizer"
            ) from None

    def save_processor(self, processor: Any, folder: Path) -> None:
        processor.save_pretrained(str(folder))

    def dummy_inputs(self, config: Any) -> Inputs:
        shape = (2, int(getattr(config, "num_channels", 3)), *image_size(config))
        return {"pixel_values": torch.rand(shape, generator=torch.Generator().manual_seed(0))}

    def load(self, request: SampleRequest) -> Samples:
        recipe = request.recipe
        folders = _folders(recipe.calibration)
        paths = choose_images(folders, recipe.samples, recipe.seed, recipe.use_all_tokens)
        if len(paths) < 2 * recipe.batch_size:
            # Possible with --use-all-tokens only.
            raise UserError(
                f"there are {len(paths)} images; at least two batches of {recipe.batch_size} are needed:"
                " lower --batch-size"
            )
        pixels = _pixels(paths, request.processor, request.model)
        description = {}
        for folder in folders:
            inside = set(find_images(folder))
            own = [path for path in paths if path in inside]
            if own:
                description[folder] = {
                    "kind": "images",
                    "path": folder,
                    "weight": 1.0,
                    "rows": len(own),
                    "sha256": files_sha256(own),
                }
        # Not of the files: another processor makes other data of them.
        return Samples({"pixel_values": pixels}, description, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())

    def check_evaluation(self, options: EvaluationOptions) -> None:
        need_pillow()
        if options.data is not None:
            find_images(options.data)

    def evaluation(self, model: Any, processor: Any, options: EvaluationOptions) -> EvaluationRows:
        if options.data is None:
            return EvaluationRows([self.dummy_inputs(model.config)], "2 images of noise (name a folder with --data)")
        paths = find_images(options.data)
        paths = choose_images((options.data,), options.windows or len(paths), options.seed, use_all=True)
        pixels = _pixels(paths, processor, model)
        batches = [{"pixel_values": part} for part in pixels.split(IMAGES_A_BATCH)]
        return EvaluationRows(batches, f"{len(paths)} images of {options.data}")


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that a model of ``config`` takes, in pixels."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(height), int(width)


def _pixels(paths: list[Path], processor: Any, model: Any) -> torch.Tensor:
    pixels = read_pixels(paths, processor)
    wanted = image_size(model.config)
    if tuple(pixels.shape[-2:]) != wanted and not _takes(model, pixels[:1]):
        made = "x".join(map(str, pixels.shape[-2:]))
        raise UserError(
            f"the image processor makes images of {made} pixels, the model takes {wanted[0]}x{wanted[1]};"
            " use the processor that belongs to the model"
        )
    return pixels


def _takes(model: Any, pixels: torch.Tensor) -> bool:
    """Whether the model can be fed images of this size, though its config names another, as DINOv2 can."""
    try:
        # Blocks may be in half precision where the rest is not.
        whole = copy.deepcopy(model).float()
        with torch.no_grad():
            whole(pixel_values=pixels.to(next(whole.parameters()).device))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _folders(calibration: tuple[str, ...]) -> tuple[str, ...]:
    """The folders named; UserError when there is none, or for what only text has: weights, and ``self``."""
    if not calibration:
        raise UserError("this model is fed images: name a folder of them with --calibration DIR")
    for name in calibration:
        if name == SELF:
            raise UserError("'self' is text that a model writes; name a folder of images with --calibration DIR")
        if Source.parse(name).name != name and not Path(name).exists():
            raise UserError(f"{name!r}: folders of images take no weight; put the images wanted into one folder")
    return calibration
