"""Says what a step of a recipe is by its number: stage, samples, learning rate. Nothing here has a state."""

import math
from dataclasses import dataclass

from serpent_ir.training.recipe import Recipe, Stage


@dataclass(frozen=True)
class Schedule:
    """A recipe applied to a training set. `lengths` are the steps of each of its stages."""

    recipe: Recipe
    lengths: tuple[int, ...]

    @property
    def steps(self) -> int:
        return sum(self.lengths)

    def place(self, step: int) -> tuple[int, Stage, int]:
        """The number of a step's stage, the stage, and how many samples were drawn before the step."""
        samples = 0
        for number, (stage, length) in enumerate(zip(self.recipe.stages, self.lengths, strict=True)):
            if step < length:
                return number, stage, samples + step * stage.batch
            step -= length
            samples += length * stage.batch
        raise IndexError(step)

    def samples(self, step: int) -> range:
        """Global numbers of a step's samples."""
        _, stage, first = self.place(step)
        return range(first, first + stage.batch)

    def lr(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine to zero."""
        warm = min(1.0, (step + 1) / max(1, self.recipe.warmup))
        return self.recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def decay(self, step: int) -> float:
        """Decay of the averaged weights.

        At first they follow quickly, so that the initial weights have no influence.
        """
        return min(self.recipe.ema, (1 + step) / (10 + step))

    def ends_stage(self, done: int) -> bool:
        """Whether a stage ends after `done` steps."""
        return done == self.steps or self.place(done)[0] != self.place(done - 1)[0]

    def validates(self, done: int) -> bool:
        """Whether the weights after `done` steps are kept and validated."""
        return done > 0 and (self.ends_stage(done) or done % self.recipe.val_every == 0)

    def seconds_left(self, done: int, seconds: float) -> float:
        """Estimated seconds of the rest of the run, from the last step's.

        A step's time is taken to follow its pixels.
        """
        number, stage, _ = self.place(done - 1)
        ahead = [(stage, sum(self.lengths[: number + 1]) - done)]
        ahead += zip(self.recipe.stages[number + 1 :], self.lengths[number + 1 :], strict=True)
        return seconds * sum(n * s.batch * s.crop**2 for s, n in ahead) / (stage.batch * stage.crop**2)
