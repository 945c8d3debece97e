"""A budget that makes every group of another size."""

from mmrl.schema import StrictModel


class Config(StrictModel):
    """``least``: what it says of its smallest group."""

    least: int = 2


def bounds(config, mean_size):
    return config.least, 2 * mean_size - 1


def allocate(prompts, mean_size, config, state):
    """In turn fewer and more than the mean by up to all but one of it."""
    steps = [(i // 2) % (mean_size - 1) + 1 for i in range(len(prompts))]
    sizes = [mean_size + (step if i % 2 else -step) for i, step in enumerate(steps)]
    if len(prompts) % 2:
        sizes[-1] = mean_size
    return sizes
