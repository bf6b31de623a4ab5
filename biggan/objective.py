"""What both networks are trained to do: an adversarial loss on augmented images, and penalties of the discriminator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from biggan import losses, penalties
from biggan.augmentation import Augmentation, flip, translation
from biggan.config import TrainConfig
from biggan.logit_memory import AdaptiveProbability, LogitMeans, Memory
from biggan.objective_options import needs_second_derivatives

Discriminate = Callable[[Tensor, Tensor], Tensor]  # images (N, 3, R, R), classes (N,) -> logits (N,), float32

LOSSES = {
    "hinge": (losses.hinge_discriminator_loss, losses.hinge_generator_loss),
    "nonsaturating": (losses.nonsaturating_discriminator_loss, losses.nonsaturating_generator_loss),
    "relativistic": (losses.relativistic_discriminator_loss, losses.relativistic_generator_loss),
}
CONSISTENCY_NUMBERS = 3  # uniform numbers of a flip and a shift


class Objective:
    """The losses of a step's parts, and what later steps remember of it.

    Args:
        config: sound, as `objective_options.check` finds it.
        put: brings a host tensor to the device.

    Attributes:
        names: what `discriminator_loss` returns beside the loss: both sides of the adversarial loss, mean logits, and
            of each option that is on its own value, not multiplied by its strength.
        remembered: the names of the values for the log that `remember` returns.
        numbers: the uniform numbers in [0, 1) that are drawn for each image, real or generated.
        pairs: whether the generator's loss looks at real images too.
    """

    def __init__(self, config: TrainConfig, put: Callable[[Tensor], Tensor]) -> None:
        self.loss, augment = config.loss, config.augment
        self._discriminator_loss, self._generator_loss = LOSSES[self.loss.name]
        self.pairs = self.loss.name == "relativistic"
        self._augmentation = Augmentation(augment.policy)
        self._probability = augment.probability
        self._memories: dict[str, Memory] = {}
        if augment.target:
            speed = config.global_batch_size / (1000 * augment.kimg)
            adaptive = AdaptiveProbability(augment.target, speed, augment.probability, put)
            self._memories["augmentation"] = adaptive
        if self.loss.lecam:
            self._memories["lecam"] = LogitMeans(self.loss.lecam_decay, put)
        self._lecam_start = max(1, self.loss.lecam_start_step * config.d_steps_per_g_step)  # in discriminator steps
        self._penalised = needs_second_derivatives(config)
        self._consistent = bool(self.loss.consistency_real or self.loss.consistency_fake)
        self.numbers = self._augmentation.numbers + CONSISTENCY_NUMBERS * self._consistent
        options = {"r1": self._penalised, "r2": self._penalised, "lecam": self.loss.lecam}
        options |= dict.fromkeys(("consistency_real", "consistency_fake"), self._consistent)
        options["sign_real"] = augment.target
        base = ("loss_d_real", "loss_d_fake", "logits_real", "logits_fake")
        self.names = (*base, *(name for name, on in options.items() if on))
        self.remembered = ("augment_probability",) if augment.target else ()

    def discriminator_loss(
        self,
        discriminate: Discriminate,
        real: tuple[Tensor, Tensor],
        fake: tuple[Tensor, Tensor],
        uniforms: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of a part and the detached values of `names`.

        All images go through one call of the discriminator: its spectral norms take one step of their iteration in it.

        Args:
            real, fake: images (B, 3, R, R) in [-1, 1], and classes, int64 (B,).
            uniforms: (B, 2, numbers), the reals' and the fakes'; None where `numbers` is 0.
        """
        images, classes = (paired(*both) for both in zip(real, fake, strict=True))
        if self._penalised:
            images.requires_grad_()
        seen, rest = self._augment(images, uniforms)
        if self._consistent:
            changed = translation(flip(seen, rest[:, :1]), rest[:, 1:])
            seen, classes = paired(seen, changed), paired(classes, classes)
        with sdpa_kernel(SDPBackend.MATH) if self._penalised else contextlib.nullcontext():
            logits = discriminate(seen, classes)
        if self._consistent:
            logits, logits_changed = logits.view(-1, 2).unbind(1)
        logits_real, logits_fake = logits.view(-1, 2).unbind(1)
        loss_real, loss_fake = self._discriminator_loss(logits_real, logits_fake)
        loss = loss_real + loss_fake
        values = [loss_real, loss_fake, logits_real.mean(), logits_fake.mean()]
        if self._penalised:
            r1, r2 = penalties.squared_gradients(logits, images).view(-1, 2).mean(0)
            loss = loss + self.loss.r1 / 2 * r1 + self.loss.r2 / 2 * r2
            values += [r1, r2]
        if memory := self._memories.get("lecam"):
            penalty = penalties.lecam(logits_real, logits_fake, memory.state["mean_real"], memory.state["mean_fake"])
            started = memory.state["updates"] >= self._lecam_start
            loss = loss + self.loss.lecam * started * penalty
            values.append(penalty)
        if self._consistent:
            of_real, of_fake = (logits - logits_changed).square().view(-1, 2).mean(0)
            loss = loss + self.loss.consistency_real * of_real + self.loss.consistency_fake * of_fake
            values += [of_real, of_fake]
        if "augmentation" in self._memories:
            # Where only differences count, the level of the logits means nothing.
            margin = logits_real - logits_fake if self.pairs else logits_real
            values.append(margin.sign().mean())
        return loss, torch.stack(values).detach()

    def generator_loss(
        self,
        discriminate: Discriminate,
        real: tuple[Tensor, Tensor] | None,
        fake: tuple[Tensor, Tensor],
        uniforms: Tensor | None,
    ) -> Tensor:
        """The loss of a part; arguments as above, without `real` unless `pairs`."""
        if self.pairs:
            images, classes = (paired(*both) for both in zip(real, fake, strict=True))
            logits_real, logits_fake = discriminate(self._augment(images, uniforms)[0], classes).view(-1, 2).unbind(1)
            return self._generator_loss(logits_fake, logits_real)
        images, classes = fake
        uniforms = None if uniforms is None else uniforms[:, 1:]
        return self._generator_loss(discriminate(self._augment(images, uniforms)[0], classes))

    def _augment(self, images: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The images as the discriminator sees them, and the uniform numbers that are left."""
        if uniforms is None:
            return images, None
        memory = self._memories.get("augmentation")
        probability = memory.probability if memory else self._probability
        uniforms, count = uniforms.flatten(0, 1), self._augmentation.numbers
        return self._augmentation(images, uniforms[:, :count], probability), uniforms[:, count:]

    def remember(self, means: dict[str, Tensor], healthy: Tensor) -> dict[str, Tensor]:
        """To be called after an update of the discriminator; returns the values of `remembered`.

        Args:
            means: the values of `names` over the whole batch.
            healthy: bool (), whether the update was applied.
        """
        values = {}
        if memory := self._memories.get("lecam"):
            memory.update(means["logits_real"], means["logits_fake"], healthy)
        if memory := self._memories.get("augmentation"):
            memory.update(means["sign_real"], healthy)
            values["augment_probability"] = memory.probability
        return values

    def state_dict(self) -> dict[str, Any]:
        return {name: memory.state_dict() for name, memory in self._memories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state` has; the rest starts anew."""
        for name, memory in self._memories.items():
            memory.load_state_dict(state.get(name, {}))


def paired(first: Tensor, second: Tensor) -> Tensor:
    """Two batches as one of twice the size, each row next to its partner: a sharded batch needs no reshuffling."""
    return torch.stack([first, second], 1).flatten(0, 1)
