"""What the families of vision-language models have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.sharding import is_split
from mmrl.types import Prompt
from vlm.encoding import text_positions


class Family:
    """Positions of a prompt's tokens, what must not be sampled, and the tower, of models like
    Qwen-VL.

    ``INPUTS``: what the network takes beside token ids.  ``LORA_TARGETS`` and
    ``VISION_LORA_TARGETS``: patterns of module names.  ``AXES``: of positions.  ``PIXELS``: the
    network's name for those of a kind of pictures.
    """

    INPUTS: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
    )
    PLACES: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    PIXELS: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    LORA_TARGETS: ClassVar[str] = (
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )
    VISION_LORA_TARGETS: ClassVar[str] = (
        r".*visual\.(?!patch_embed).*(qkv|proj|linear_fc[12]|mlp\.[02])"
    )
    AXES: ClassVar[int] = 3
    VISION: ClassVar[str] = "visual"

    def __init__(self, network: Any) -> None:
        self._network = network

    @classmethod
    def lora_targets(cls, *, train_vision: bool) -> str:
        """A pattern of the modules that get adapters."""
        return f"{cls.LORA_TARGETS}|{cls.VISION_LORA_TARGETS}" if train_vision else cls.LORA_TARGETS

    @classmethod
    def tower_of(cls, network: Any) -> Any:
        """The part of a network that reads images and videos."""
        return getattr(network.base_model, cls.VISION)

    def positions(self, found: Any) -> tuple[Tensor, int]:
        """[A, P] of a processor's output for one prompt, and the position that follows."""
        ids = found["input_ids"]
        given = {name: found[name] for name in self.PLACES if name in found}
        if not given:
            return text_positions(ids.shape[1], self.AXES), ids.shape[1]
        positions, _ = self._network.base_model.get_rope_index(
            ids, found["mm_token_type_ids"], **given
        )
        # The last token is text of the template.  Its position need not be the largest: the time of
        # a video may lie beyond the text behind it, from which transformers goes on all the same.
        return positions[:, 0], int(positions[0, 0, -1]) + 1

    def refuse_mismatch(
        self, ids: Sequence[int], inputs: Mapping[str, Tensor], prompt: Prompt
    ) -> None:
        """``UserError`` unless tokens of a prompt and a completion have places for as many features
        as its pictures become.
        """
        config = self._network.config
        merged = config.vision_config.spatial_merge_size**2
        for kind in self.PIXELS:
            grid = inputs.get(f"{kind}_grid_thw")
            features = 0 if grid is None else int(grid.prod(-1).sum()) // merged
            places = list(ids).count(getattr(config, f"{kind}_token_id"))
            if places != features:
                raise UserError(
                    f"{prompt.named} has {places} {kind} tokens for {features} features of its "
                    f"{kind}s"
                )

    def forbidden(self) -> tuple[int, ...]:
        """Ids that stand for vision and are never sampled."""
        config = self._network.config
        names = ("image", "video", "vision_start", "vision_end")
        found = (getattr(config, f"{name}_token_id", None) for name in names)
        return tuple(i for i in found if i is not None)

    # The tower

    @classmethod
    def freeze_vision(cls, network: Any) -> None:
        """The tower of a network stays as it was loaded."""
        cls.tower_of(network).requires_grad_(False)

    def keep_in_step(self, kinds: Sequence[str]) -> None:
        """Let every forward pass the tower once for each of ``kinds``, those of the whole data set.

        Where a batch has no picture of a kind, one of zeros takes its place and adds 0 times its
        features.  So each process gathers the same sharded weights in the same order, and every
        parameter of the tower has a gradient, which DDP waits for.  (DDP's
        ``find_unused_parameters`` would spare that work, but there is nothing like it for FSDP and
        ZeRO; and an optimizer passes over parameters without gradients, so results would depend on
        the split into micro-batches.)
        """
        network = self._network
        trained = any(p.requires_grad for p in self.tower_of(network).parameters())

        def add(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            missing = [kind for kind in kinds if options.get(self.PIXELS[kind]) is None]
            wanted = (trained and torch.is_grad_enabled()) or is_split(model)
            ids = options.get("input_ids")
            if not missing or not wanted or ids is None or ids.shape[1] == 1:
                return None  # one token: a step of generation, where no process has a picture
            nothing = sum(self._zero_features() for _ in missing)
            embedded = model.get_input_embeddings()(ids) + 0.0 * nothing
            return args, {**options, "input_ids": None, "inputs_embeds": embedded}

        network.base_model.register_forward_pre_hook(add, with_kwargs=True)

    def _zero_features(self) -> Tensor:
        """The sum of all that the tower makes of the smallest black picture."""
        vision = self._network.config.vision_config
        merge = vision.spatial_merge_size
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        tower = self.tower_of(self._network)
        like = next(tower.parameters())
        pixels = torch.zeros(merge**2, width, dtype=tower.dtype, device=like.device)
        out = tower(pixels, grid_thw=torch.tensor([[1, merge, merge]], device=like.device))
        return out.pooler_output.sum() + sum(
            x.sum() for x in getattr(out, "deepstack_features", ())
        )
