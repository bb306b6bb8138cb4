"""The diffusion head: one file, two verbs. `losses` trains the denoiser on an item's latents given the LLM's hidden
state at `<item>`; `sample` draws latents. `query` is its one-step prediction from pure noise, read out as a vector that
is compared with the items' vectors.

Losses and sampler run in fp32; matrix products follow the surrounding autocast.
"""

from functools import partial
from typing import Callable

import torch
from torch import Tensor, nn

from contrec_dist.config import HeadConfig
from contrec_dist.model.denoiser import Denoiser
from contrec_dist.model.dropout import Dropout
from contrec_dist.model.losses import dispersive_loss
from contrec_dist.model.noise_schedule import NoiseSchedule
from contrec_dist.model.samplers import sample

Denoise = Callable[[slice, Tensor, Tensor], Tensor]
"(rows of the conditions, x_t (S, rows, K*Z), step) -> x0 as x_t"
SAMPLE_ROWS = 2048  # latents that are denoised at a time


class DiffusionHead(nn.Module):
    """Generates the K*Z latents of the next item given a condition.

    Shapes   condition (B, D), latents (B, K*Z) normalised to unit variance
    """

    def __init__(self, config: HeadConfig, *, condition_width: int, latent_width: int):
        super().__init__()
        self.config = config
        self.latent_width = latent_width
        self.schedule = NoiseSchedule(num_train_steps=config.num_train_steps, kind=config.schedule)
        self.norm = nn.LayerNorm(condition_width)
        self.direct_query = nn.Linear(condition_width, config.query_dim)
        self.query_dropout = Dropout(config.dropout)
        self.denoiser = None
        if config.kind == "denoiser":
            self._add_denoiser(condition_width)

    def _add_denoiser(self, condition_width: int) -> None:
        config = self.config
        self.null_condition = nn.Embedding(1, condition_width)
        self.denoiser = Denoiser(
            latent_width=self.latent_width,
            condition_width=condition_width,
            width=config.width,
            num_blocks=config.num_blocks,
        )
        self.denoised_query = nn.Linear(config.width, config.query_dim, bias=False)
        nn.init.normal_(self.null_condition.weight, std=0.02)
        nn.init.zeros_(self.denoised_query.weight)

    def query(self, condition: Tensor) -> Tensor:
        """The one-step prediction at t = T - 1 from the mean of the noise, read out in the items' space.

        Shapes   (B, D) -> (B, Q)
        """
        condition = self.query_dropout(self.norm(condition))
        if self.denoiser is None:
            return self.direct_query(condition)
        noise_mean = condition.new_zeros(len(condition), self.latent_width)
        last_step = torch.full((len(condition),), self.config.num_train_steps - 1, device=condition.device)
        features, _ = self.denoiser(noise_mean, last_step, condition)
        return self.direct_query(condition) + self.denoised_query(features)  # (B, Q)

    def losses(self, condition: Tensor, latents: Tensor, tau: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean denoising error over the conditions given and their noise draws, and the dispersive loss of the batch.

        Each condition meets `batch_mul` draws of step and noise; a share `condition_drop` of the conditions is
        replaced by the null one, which is what guidance needs.
        With `kind: bayes` there is no denoiser to train and both are zero.
        Shapes   condition (B, D), latents (B, K*Z) -> {"diffusion": (), "dispersive": ()}
        """
        if self.denoiser is None:
            zero = torch.zeros((), device=condition.device)
            return {"diffusion": zero, "dispersive": zero}
        repeats, device = self.config.batch_mul, condition.device
        condition = self._drop_conditions(self.norm(condition), generator)  # (B, D)
        x0 = latents.float().repeat(repeats, 1)  # (M*B, K*Z)
        step = torch.randint(self.config.num_train_steps, (len(x0),), generator=generator, device=device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        x_t = self.schedule.add_noise(x0, noise, step)
        features, middle = self.denoiser(x_t, step, condition)
        error = self.denoiser.output(features).float() - self.schedule.target(x0, noise, step, self.config.prediction)
        return {
            "diffusion": error.square().mean() if len(x0) else error.sum(),
            "dispersive": dispersive_loss(middle[: len(latents)], tau),
        }

    def predict_x0(self, x_t: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        """Denoised latents, fp32, for the shapes of Denoiser.forward; condition after the norm. -> as x_t"""
        features, _ = self.denoiser(x_t, step, condition)
        return self.schedule.to_x0(self.denoiser.output(features).float(), x_t, step, self.config.prediction)

    @torch.no_grad()
    def sample(
        self, condition: Tensor, *, num_samples: int = 1, num_steps: int, solver: str, guidance: float,
        generator: torch.Generator, guidance_min_sigma: float = 0.0, guidance_max_sigma: float = 1.0,
        step_spacing: float = 1.0, denoise: Denoise | None = None,
    ) -> Tensor:
        """`num_samples` latents a condition by `num_steps` solver steps: x0 = (1 + w) x0(h) - w x0(null).

        Where sigma(t) lies outside `guidance_min_sigma` to `guidance_max_sigma` x0(h) is taken alone, at half the cost: below,
        the latent is all but decided; above, there is nothing in it yet to guide (arXiv 2404.07724).
        `denoise(rows, x_t, step)` takes the learned denoiser's place, guidance included (`kind: bayes`: CataloguePosterior).

        Conditions go through in chunks that fit a core's cache, each drawing its noise after the one before.
        Shapes   condition (B, D) -> (S, B, K*Z), normalised latents, float32
        """
        denoise = denoise or self._guided_denoiser(condition, guidance, guidance_min_sigma, guidance_max_sigma)
        drawn = condition.new_empty(num_samples, len(condition), self.latent_width, dtype=torch.float32)
        chunk_rows = max(1, SAMPLE_ROWS // num_samples)
        for start in range(0, len(condition), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(condition)))
            drawn[:, rows] = sample(
                partial(denoise, rows), self.schedule, shape=(num_samples, rows.stop - start, self.latent_width),
                num_steps=num_steps, spacing=step_spacing, solver=solver, generator=generator, device=condition.device,
            )
        return drawn

    def _guided_denoiser(self, condition: Tensor, guidance: float, min_sigma: float, max_sigma: float) -> Denoise:
        condition, null = self.norm(condition.float()), self.null_conditions(1)

        def denoise(rows: slice, x_t: Tensor, step: Tensor) -> Tensor:
            conditional = self.predict_x0(x_t, step[:1], condition[rows])
            if guidance == 0.0 or not min_sigma <= self.schedule.sigmas[int(step[0])] <= max_sigma:
                return conditional
            return conditional + guidance * (conditional - self.predict_x0(x_t, step[:1], null))

        return denoise

    def null_conditions(self, count: int) -> Tensor:
        """The learned condition that says nothing, as guidance and likelihood need it. -> (count, D)"""
        device = self.null_condition.weight.device
        return self.null_condition(torch.zeros(count, dtype=torch.int64, device=device))

    def _drop_conditions(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.rand(len(condition), 1, generator=generator, device=condition.device)
        return torch.where(draw < self.config.condition_drop, self.null_conditions(len(condition)), condition)


class HeadAverage(nn.Module):
    """Exponential moving average of the head's parameters, kept as buffers so that checkpoints carry it.

    The decay warms up as (1 + s) / (10 + s), so short runs are not dominated by the start.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        for name, value in parameters.items():
            self.register_buffer(self._buffer_name(name), value.detach().clone())

    @staticmethod
    def _buffer_name(name: str) -> str:
        return name.replace(".", "__")

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor]) -> None:
        """Move towards the given values, which must be whole (gathered) tensors."""
        self.num_updates += 1
        count = int(self.num_updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        for name, value in parameters.items():
            getattr(self, self._buffer_name(name)).lerp_(value.detach().float(), 1 - decay)
