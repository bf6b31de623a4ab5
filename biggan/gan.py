"""The two networks of a run with their optimizers, and one training step.

A step is `d_steps_per_g_step` updates of the discriminator and one of the generator, then one of the averaged
generator. It is a function of its tensors alone: nothing in it reads a number back from the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from biggan.blocks import Stage
from biggan.config import TrainConfig
from biggan.discriminator import Discriminator
from biggan.ema import update_ema
from biggan.generator import Generator
from biggan.hash_projections import draw_projections, use_projections
from biggan.losses import add_orthogonal_gradient
from biggan.objective import Objective
from biggan.objective_options import with_second_derivatives
from runtime.device import Device
from runtime.errors import UserError
from runtime.guard import Guard, gradient_norms
from runtime.state import load_optimizer_by_name, load_weights, optimizer_state_by_name


def build_generator(config: TrainConfig) -> Generator:
    """Raises UserError where the configuration asks for what no architecture or mechanism has."""
    model, attention = config.model, config.attention
    return _build(
        Generator,
        channels=model.generator_channels,
        dim_z=model.dim_z,
        shared_dim=model.shared_dim,
        hierarchical=model.hierarchical,
        attention_resolutions=attention.generator_resolutions,
        config=config,
    )


def build_discriminator(config: TrainConfig) -> Discriminator:
    """Raises UserError where the configuration asks for what no architecture or mechanism has."""
    return _build(
        Discriminator,
        channels=config.model.discriminator_channels,
        attention_resolutions=config.attention.discriminator_resolutions,
        config=with_second_derivatives(config),
    )


def _build(network: type[nn.Module], *, config: TrainConfig, **arguments: Any) -> Any:
    try:
        return network(
            resolution=config.model.resolution,
            num_classes=config.model.num_classes,
            attention=config.attention.name,
            attention_options=config.attention.options,
            **arguments,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{network.__name__.lower()}: {error}") from None


def initial_weights(config: TrainConfig) -> dict[str, Any]:
    """What `Gan.load_state_dict` makes a new `Gan` of, on the host; it draws what the constructor draws."""
    return {
        "generator": build_generator(config).state_dict(),
        "discriminator": build_discriminator(config).state_dict(),
    }


RECOMPUTED_PARTS = {"none": (), "attention": ("attention",), "blocks": ("residual", "attention")}


class Gan:
    """Generator, discriminator, averaged generator and both optimizers, on `device`."""

    def __init__(self, config: TrainConfig, device: Device):
        self.config, self.device = config, device
        self.objective = Objective(config, device.put)
        of_both = "grad_norm_d", "loss_g", "grad_norm_g"
        self.step_values = (*self.objective.names, *of_both, *self.objective.remembered)
        channels_last = config.channels_last and device.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.generator, self.discriminator = build_generator(config), build_discriminator(config)
        self.ema_generator = copy.deepcopy(self.generator).eval().requires_grad_(False)
        for network in (self.generator, self.discriminator, self.ema_generator):
            device.put_network(network, self.memory_format, config.shard_parameters)
        self._networks = nn.ModuleList([self.generator, self.discriminator])  # in the order of a step's projections
        self.generator_optimizer = self._adam(self.generator, config.optimizer.generator_lr)
        self.discriminator_optimizer = self._adam(self.discriminator, config.optimizer.discriminator_lr)
        for stage in self._networks.modules():
            if isinstance(stage, Stage):
                stage.recompute = device.recompute
                stage.recomputed_parts = RECOMPUTED_PARTS[config.checkpoint_activations]
        self.guard = Guard(self._guarded_values(), device.put)
        self._generate = device.compile_network(self.generator) if config.compile else self.generator
        self._discriminate = device.compile_network(self.discriminator) if config.compile else self.discriminator

    def _adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        options = self.config.optimizer
        betas = (options.beta1, options.beta2)
        return self.device.adam(network.parameters(), lr=lr, betas=betas, eps=options.epsilon)

    def _guarded_values(self) -> dict[str, list[str]]:
        """The names of what `guard` gets to see of each update."""
        losses = {"discriminator": self.objective.names, "generator": ("loss_g",)}
        return {
            name: [*of_step, *(f"gradient of {name}.{n}" for n, _ in getattr(self, name).named_parameters())]
            for name, of_step in losses.items()
        }

    def _update(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """An update of a network, unless its values or gradients are not finite; returns the norm of the gradients."""
        norms = gradient_norms(getattr(self, name))
        healthy = self.guard.check(name, torch.cat([values, norms]))
        self.device.update(getattr(self, f"{name}_optimizer"), healthy)
        return torch.linalg.vector_norm(norms)

    def draw_projections(self, generator: torch.Generator) -> list[torch.Tensor]:
        """The `projections` of a step, on the host."""
        calls = (self.config.d_steps_per_g_step + 1, self.config.accumulation_steps)
        return draw_projections(self._networks, calls, generator)

    def step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        z: torch.Tensor,
        y: torch.Tensor,
        ema_rate: torch.Tensor,
        *projections: torch.Tensor,
        uniforms: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One whole training step.

        Args, with S = d_steps_per_g_step, A = accumulation_steps, B = images a part:
            images: uint8 (S, A, B, 3, R, R), real.  labels: int64 (S, A, B).
            z: (S + 1, A, B, dim_z), y: int64 (S + 1, A, B): latents and classes of fakes; the last is the generator's.
            ema_rate: () or (1,) float32, 1 - decay of the averaged generator.
            projections: (S + 1, A, ...) for each SMYRF attention, the generator's first, as `draw_projections` makes;
                without them each draws its own.
            uniforms: (S + 1, A, B, 2, n) in [0, 1), what augmentation is made of, for reals and fakes; n is
                `objective.numbers`. None where that is 0.

        Where processes share a batch, B are the rows of this one. From an update on whose losses or gradients are not
        finite, networks and optimizers stay as they are, until `guard` is reset; statistics and the averaged generator
        are not to be used then.

        Returns:
            Detached scalars by the names in `step_values`: losses, mean logits and gradient norms of the generator's
            and the last discriminator step, over the whole batch.
        """
        values = {}
        uniforms = [None] * len(z) if uniforms is None else uniforms
        for i in range(self.config.d_steps_per_g_step):
            directions = [p[i] for p in projections]
            values = self.discriminator_step(images[i], labels[i], z[i], y[i], directions, uniforms[i])
        reals = (images[-1], labels[-1]) if self.objective.pairs else None
        values |= self.generator_step(z[-1], y[-1], [p[-1] for p in projections], uniforms[-1], reals)
        update_ema(self.ema_generator, self.generator, ema_rate.squeeze())
        self.guard.end_step()
        return values

    def discriminator_step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        z: torch.Tensor,
        y: torch.Tensor,
        projections: Sequence[torch.Tensor] = (),
        uniforms: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One update of the discriminator; shapes as in `step` without S."""
        self.discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        parts = len(images)
        uniforms = [None] * parts if uniforms is None else uniforms
        found = []
        for part, (real, real_y, part_z, part_y) in enumerate(zip(images, labels, z, y, strict=True)):
            self._use_projections([p[part] for p in projections])
            with torch.no_grad():  # the generator stays in training mode: its batch norms see these fakes too
                fake = self._fakes(part_z, part_y)
            loss, values = self.objective.discriminator_loss(
                self._judge, (self._prepare(real), real_y), (fake, part_y), uniforms[part]
            )
            (loss / parts).backward()
            found.append(values)
        self._use_projections([])
        self.device.average_gradients(self.discriminator.parameters())
        means = self.device.mean(torch.stack(found).mean(0))
        norm = self._update("discriminator", means)
        values = dict(zip(self.objective.names, means.unbind(), strict=True)) | {"grad_norm_d": norm}
        return values | self.objective.remember(values, self.guard.healthy)

    def generator_step(
        self,
        z: torch.Tensor,
        y: torch.Tensor,
        projections: Sequence[torch.Tensor] = (),
        uniforms: torch.Tensor | None = None,
        reals: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """One update of the generator; shapes as in `step` without S. A loss of pairs needs `reals`: images, labels."""
        self.discriminator.requires_grad_(False)  # its gradients are not needed here, and cost as much as the fakes'
        self.generator_optimizer.zero_grad(set_to_none=True)
        parts, losses = len(z), []
        uniforms = [None] * parts if uniforms is None else uniforms
        for part, (part_z, part_y) in enumerate(zip(z, y, strict=True)):
            self._use_projections([p[part] for p in projections])
            fake, real = (self._fakes(part_z, part_y), part_y), None
            if reals:
                real = self._prepare(reals[0][part]), reals[1][part]
            loss = self.objective.generator_loss(self._judge, real, fake, uniforms[part])
            (loss / parts).backward()
            losses.append(loss.detach())
        self._use_projections([])
        self.device.average_gradients(self.generator.parameters())
        if self.config.optimizer.orthogonal_penalty:
            add_orthogonal_gradient(self.generator, self.config.optimizer.orthogonal_penalty)
        mean = self.device.mean(torch.stack(losses).mean())
        return {"loss_g": mean, "grad_norm_g": self._update("generator", mean[None])}

    def _fakes(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """float32 (B, 3, R, R) in [-1, 1]."""
        with self.device.autocast(self.config.precision):
            return self._generate(z, y).float()

    def _judge(self, images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The logits of images (N, 3, R, R): float32 (N,)."""
        with self.device.autocast(self.config.precision):
            return self._discriminate(images.contiguous(memory_format=self.memory_format), y).float().squeeze(1)

    def _use_projections(self, projections: Sequence[torch.Tensor]) -> None:
        use_projections(self._networks, projections)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, R, R) -> float32 in [-1, 1]."""
        return images.float() / 127.5 - 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later step depends on; the optimizers' states go by parameter names."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema_generator": self.ema_generator.state_dict(),
            "generator_optimizer": optimizer_state_by_name(self.generator, self.generator_optimizer),
            "discriminator_optimizer": optimizer_state_by_name(self.discriminator, self.discriminator_optimizer),
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state` has; an averaged generator that it lacks becomes a copy of the generator, and the reverse.
        What the objective remembers starts anew where `state` lacks it.

        Raises:
            UserError: the networks have another architecture than the state's.
        """
        for name, other in (("generator", "ema_generator"), ("ema_generator", "generator"), ("discriminator", "")):
            if name in state or other in state:
                load_weights(getattr(self, name), state.get(name, state.get(other)), name)
        for name in ("generator", "discriminator"):
            optimizer = getattr(self, f"{name}_optimizer")
            load_optimizer_by_name(getattr(self, name), optimizer, state.get(f"{name}_optimizer", {}))
        self.objective.load_state_dict(state.get("objective", {}))
        self.guard.reset()


def steps_for(config: TrainConfig, kimg: float) -> int:
    """Training steps that show the discriminator `kimg` thousand real images, at least 1."""
    return max(1, math.ceil(kimg * 1000 / images_per_step(config)))


def images_per_step(config: TrainConfig) -> int:
    return config.global_batch_size * config.d_steps_per_g_step
