"""What the families of vision-language models have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vlm.encoding import text_positions


class Family:
    """Positions of a prompt's tokens, and what must not be sampled, of models like Qwen-VL.

    ``INPUTS``: what the network takes beside token ids.  ``LORA_TARGETS``: a pattern of module
    names.  ``AXES``: of positions.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    LORA_TARGETS: ClassVar[str] = (
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )
    AXES: ClassVar[int] = 3
    VISION: ClassVar[str] = "visual"

    def __init__(self, network: Any) -> None:
        self._network = network

    def positions(self, found: Any) -> tuple[Tensor, int]:
        """[A, P] of a processor's output for one prompt, and the position that follows."""
        ids = found["input_ids"]
        if "image_grid_thw" not in found:
            return text_positions(ids.shape[1], self.AXES), ids.shape[1]
        positions, _ = self._network.base_model.get_rope_index(
            ids, found["mm_token_type_ids"], image_grid_thw=found["image_grid_thw"]
        )
        return positions[:, 0], int(positions.max()) + 1

    def forbidden(self) -> tuple[int, ...]:
        """Ids that stand for vision and are never sampled."""
        config = self._network.config
        names = ("image", "video", "vision_start", "vision_end")
        found = (getattr(config, f"{name}_token_id", None) for name in names)
        return tuple(i for i in found if i is not None)

    def freeze_vision(self) -> None:
        """The tower that reads images stays as it was loaded."""
        getattr(self._network.base_model, self.VISION).requires_grad_(False)
