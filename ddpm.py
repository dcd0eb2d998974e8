"""Diffusion: how noise is added, why predicting it is enough to generate, and three ways to walk back.

    symbol                  name here        what it is                                                   paper
    beta_t                  beta             variance of the noise added at step t                        DDPM 2
    alpha_t                 -                1 - beta_t                                                   DDPM 2
    abar_t                  alpha_bar        alpha_1 * ... * alpha_t: how much signal power is left       DDPM 2
    q(x_t | x_{t-1})        -                N(sqrt(alpha_t) x_{t-1}, beta_t I)                           DDPM Eq. 2
    q(x_t | x_0)            q_sample         N(sqrt(abar_t) x_0, (1 - abar_t) I)                          DDPM Eq. 4
    q(x_{t-1} | x_t, x_0)   posterior        N(mu~_t, beta~_t I)                                          DDPM Eq. 6-7
    SNR(t)                  snr              abar_t / (1 - abar_t)

The forward process drowns a picture in noise, a little at every step, and needs no learning. Its closed form (Eq. 4)
says that all those small steps up to t are one large one, so training can jump to any t. Going backwards needs
q(x_{t-1} | x_t), which nobody knows; but if x_0 were known as well, it would be a Gaussian (Eq. 6). So a network
guesses x_0, or what is the same by Eq. 4, the noise eps, and we step with the guess in place of the truth. (Asked for
x_0 itself, DDPM drew worse, section 3.2: an error there weighs differently at each t, see `diffusion_loss`.)

Why is a squared error on eps enough? The negative log likelihood is bounded by a sum of KL divergences between the true
posterior and the model's step, one for each t (Eq. 5). Both are Gaussians of the same variance, so each KL is a
weighted squared distance of their means (Eq. 8). Written in eps, that is weight_t * |eps - eps_theta(x_t, t)|^2
(Eq. 12). With all weights 1, the simple loss (Eq. 14) spends more on large t than the bound, and draws better.

Papers: Ho et al. 2020 (DDPM); Song et al. 2020 (DDIM); Lu et al. 2022, "DPM-Solver++" (DPM++); Ho & Salimans 2022
(classifier-free guidance); Salimans & Ho 2022 (v-prediction); Hang et al. 2023 (min-SNR); Nichol & Dhariwal 2021
(cosine). Here t is 0-based: t = 0 is the paper's t = 1, and "before t = 0" alpha_bar = 1, no noise
(Stable Diffusion's DDIM stops at alpha_bar_0, a trace of noise short of it: set_alpha_to_one = False).
Letters: B batch; x is whatever is diffused, of any shape (B, ...): for Stable Diffusion, latents (B, 4, h, w).
Read next: unet.py."""
import contextlib, copy, functools, math, os, re
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

class NoiseSchedule:
    """The constants of the forward process, and what follows from them alone. No arguments: Stable Diffusion 1.5's.
    num_train_timesteps       T
    beta_start, beta_end      first and last beta (unused by "cosine")
    beta_schedule             "linear", "scaled_linear" (linear in sqrt(beta)) or "cosine"
    prediction_type           what the network says: "epsilon" (the noise) or "v_prediction" (see `velocity`)
    steps_offset, set_alpha_to_one, timestep_spacing, clip_sample     how published models want to be sampled"""
    def __init__(self, num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 prediction_type="epsilon", steps_offset=1, set_alpha_to_one=False, timestep_spacing=None,
                 clip_sample=False):
        self.config = {k: v for k, v in locals().items() if k != "self"}
        T = self.T = num_train_timesteps
        if not (type(T) is type(steps_offset) is int and max(abs(steps_offset), 1) <= T <= 10 ** 6 and beta_start > 0):
            raise ValueError(f"num_train_timesteps = {T}, beta_start = {beta_start}, beta_end = {beta_end}, "
                             f"steps_offset = {steps_offset} are no schedule")
        if beta_schedule == "linear":                              # DDPM, section 4
            beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        elif beta_schedule == "scaled_linear":                     # Stable Diffusion: slower at first
            beta = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, T, dtype=torch.float64) ** 2
        elif beta_schedule in ("cosine", "squaredcos_cap_v2"):     # Nichol & Dhariwal, Eq. 17; betas clipped at 0.999
            f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
            self.config["beta_schedule"] = "squaredcos_cap_v2"     # its name in published files
        else:
            raise ValueError(f"beta_schedule = {beta_schedule!r} is not linear, scaled_linear or cosine")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type = {prediction_type!r} is not epsilon or v_prediction")
        if timestep_spacing not in (None, "leading", "trailing", "linspace"):
            raise ValueError(f"timestep_spacing = {timestep_spacing!r} is not leading, trailing or linspace")
        self.prediction_type, self.clip_sample, self.steps_offset = prediction_type, clip_sample, steps_offset
        self.set_alpha_to_one, self.timestep_spacing = set_alpha_to_one, timestep_spacing
        # Products of a thousand factors near 1: multiplied in float64, kept in float32, always on the CPU.
        self.beta = beta.float()
        self.alpha_bar = torch.cumprod(1 - beta, 0).float()        # (T,)
        self.snr = self.alpha_bar / (1 - self.alpha_bar)
        if not (0 < self.alpha_bar[-1] <= self.alpha_bar[0] < 1 and (self.alpha_bar.diff() <= 0).all()):
            raise ValueError(f"beta_start = {beta_start}, beta_end = {beta_end}: noise does not grow from 0 < beta < 1")

    @classmethod
    def from_config(cls, config):
        """From a published scheduler_config.json (dict), with diffusers' defaults for what it leaves out.
        Raises ValueError naming a key that asks for something else."""
        for key in ("trained_betas", "thresholding", "rescale_betas_zero_snr"):
            if config.get(key):
                raise ValueError(f"scheduler_config.json: {key} is not supported: {config[key]!r}")
        known = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                     prediction_type="epsilon", steps_offset=0, set_alpha_to_one=True, timestep_spacing=None,
                     clip_sample=True)
        return cls(**{key: config.get(key, default) for key, default in known.items()})

    def to_config(self):
        """The dict that belongs in scheduler/scheduler_config.json, in diffusers' words."""
        config = {k: v for k, v in self.config.items() if v is not None}
        said = dict(prediction_type=self.prediction_type, clip_sample=self.clip_sample)
        return {"_class_name": "DDIMScheduler", **config, **said}

    def at(self, table, t, x):
        """table[t] shaped to multiply x: t an int -> a number; t (B,) -> (B, 1, ..., 1) on x's device."""
        if isinstance(t, int):
            return table[t].item()
        return table.to(x.device)[t].view(-1, *[1] * (x.dim() - 1))

    def q_sample(self, x0, t, noise):
        """x_t ~ q(x_t | x_0): t noising steps in one (DDPM, Eq. 4). x0, noise (B, ...); t an int or (B,)."""
        abar = self.at(self.alpha_bar, t, x0)
        return abar ** 0.5 * x0 + (1 - abar) ** 0.5 * noise

    def posterior(self, x0, x_t, t, t_prev):
        """Mean and variance of q(x_prev | x_t, x_0), Bayes' rule for two Gaussians (DDPM, Eq. 6 and 7).
        t_prev < t is where to go, negative for the very end. With t_prev = t - 1 this is the paper's; a longer stride
        is the same formula, with alpha = abar_t / abar_prev for all the steps in between."""
        abar = self.at(self.alpha_bar, t, x_t)
        abar_prev = self.at(self.alpha_bar, t_prev, x_t) if t_prev >= 0 else 1.0
        alpha = abar / abar_prev
        beta = 1 - alpha
        mean = abar_prev ** 0.5 * beta / (1 - abar) * x0 + alpha ** 0.5 * (1 - abar_prev) / (1 - abar) * x_t   # Eq. 7
        return mean, (1 - abar_prev) / (1 - abar) * beta                                                       # Eq. 7

    def velocity(self, x0, t, noise):
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho, section 4), what a v-prediction network says.

        Where noise is nearly everything, eps says little about the picture, and v turns into -x_0; where noise is
        nearly nothing v turns into eps. It is a question worth asking at every t."""
        abar = self.at(self.alpha_bar, t, x0)
        return abar ** 0.5 * noise - (1 - abar) ** 0.5 * x0

    def x0_and_eps(self, output, x_t, t):
        """Split x_t into picture and noise, as the network's output (eps or v) says: (x0, eps), each like x_t."""
        abar = self.at(self.alpha_bar, t, x_t)
        if self.prediction_type == "v_prediction":                 # Eq. 4 and v are a rotation: rotate back
            return (abar ** 0.5 * x_t - (1 - abar) ** 0.5 * output,
                    abar ** 0.5 * output + (1 - abar) ** 0.5 * x_t)
        x0 = (x_t - (1 - abar) ** 0.5 * output) / abar ** 0.5      # Eq. 4 solved for x_0
        return x0, output

    def timesteps(self, steps, sampler="ddim", strength=1.0):
        """Which of the T times to visit, as published samplers space them: [(t, t_prev), ...] with falling ints t.
        leading    0, k, 2k, ... + steps_offset, backwards, with k = T // steps: starts short of pure noise (and at 501
                   of 1,000 steps half-way to the picture, which then fails: take divisors of T)
        trailing   T - 1, T - 1 - k, ..., with k = T / steps
        linspace   evenly from T - 1 to 0
        A file that names no spacing means leading, and for DPM-Solver++ linspace. t_prev < 0 is the noiseless end.
        strength < 1 visits only that part of them, the last: a start from a picture skips the times that would decide
        everything. Raises ValueError unless 1 <= steps <= T."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps = {steps} is not between 1 and {self.T}")
        spacing = self.timestep_spacing or ("linspace" if sampler == "dpmpp" else "leading")
        points = steps + 1 if sampler == "dpmpp" else steps        # DPM-Solver++ counts the noiseless end as a point
        if spacing == "linspace":
            times = np.linspace(0, self.T - 1, points).round()[-steps:]
        elif spacing == "leading":
            times = (np.arange(points) * max(self.T // points, 1))[-steps:] + self.steps_offset
        else:
            times = np.arange(self.T, 0, -self.T / steps)[:steps].round() - 1
        times = sorted({int(t) for t in times.clip(0, self.T - 1)}, reverse=True)
        if sampler == "ddim":                                      # published DDIM steps by a fixed stride, wherever
            pairs = [(t, t - self.T // steps) for t in times]      # the next entry of the list is
        else:
            pairs = list(zip(times, times[1:] + [-1]))
        return pairs[-max(int(len(pairs) * strength), 1):]

# ---- Training --------------------------------------------------------------------------------------------------------
def diffusion_loss(schedule, model, x0, t, noise, min_snr=None):
    """Algorithm 1 of DDPM for given t (B,) and noise like x0 (B, ...) -> one loss per example (B,).

    model(x_t, t) says eps or v. min_snr: gamma of Hang et al. 2023, usually 5; None or 0: Eq. 14 as it is.
    Each loss is |error in x_0|^2 times a weight: for eps SNR(t), by Eq. 4, 1,175 at the first t, 0.005 at the last; for
    v SNR(t) + 1, so at least 1 where noise is nearly all and layouts are decided: 600 steps in, 100 % of suns stand
    where prompts say. With min-SNR it is min(SNR(t), gamma) for both (Hang et al., section 3): 55 %."""
    x_t = schedule.q_sample(x0, t, noise)                                                          # Eq. 4
    v_prediction = schedule.prediction_type == "v_prediction"
    target = schedule.velocity(x0, t, noise) if v_prediction else noise
    loss = F.mse_loss(model(x_t, t).float(), target.float(), reduction="none").flatten(1).mean(1)  # Eq. 14
    if min_snr:
        snr = schedule.snr.to(t.device)[t]
        # An error e in x_0 is an error of sqrt(SNR) e in eps, and of sqrt(SNR + 1) e in v.
        loss = loss * snr.clamp(max=min_snr) / (snr + 1 if v_prediction else snr)
    return loss

def loss_by_time(losses, t, T, parts=4):
    """Mean of losses (B,) in each range of times t (B,) that has any: {"t0-249": ..., ...}. Where is the model weak?"""
    which = t * parts // T
    return {f"t{k * T // parts}-{(k + 1) * T // parts - 1}": losses.detach()[which == k].mean()
            for k in range(parts) if (which == k).any()}

def loss_profile(schedule, model, x0, generator, parts=4):
    """The plain loss of model(x_t, t) on x0 (B, ...) with times spread evenly over [0, T) -> as loss_by_time."""
    t = (torch.arange(len(x0)) * schedule.T // len(x0)).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    return loss_by_time(diffusion_loss(schedule, model, x0, t, noise), t, schedule.T, parts)

# ---- Learning: of the U-Net, and of the two models before it; in one process or several ------------------------------
RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))     # torchrun sets both

def join(rows):
    """Rows (b, ...) of this process -> (B, ...), those of all processes in their order."""
    if WORLD == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, rows.detach())
    # Gradients reach this process's rows alone: WORLD times, since the mean over all processes will be taken.
    parts[RANK] = WORLD * rows - (WORLD - 1) * rows.detach()
    return torch.cat(parts)

def endless(n, seed):
    """An endless row of n pictures, epoch after epoch, each in an order of its own -> a function: place -> picture."""
    @functools.lru_cache(2)
    def order(epoch):
        return torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()
    return lambda place: order(place // n)[place % n]

def chances(seed, places):
    """A random generator for each place in that row: chance is the same in any batch, process, or resumed run."""
    return [torch.Generator().manual_seed((seed * 10 ** 12 + place) % 2 ** 63) for place in places]

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then a step of the same size in every direction that the gradient points in.
    A layer's gradient is a matrix with few large singular values; AdamW's step, scaled entry by entry, is one, too.
    Muon sets all of them to about 1, so that rare directions learn as fast as common ones. At 64x64 the VAE's first 90
    seconds on two cores bring it to 31.5 dB with Muon, to 26.8 dB with AdamW alone."""
    def __init__(self, params, lr=1e-3, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient; a convolution (O, I, 3, 3) counts as a matrix (O, 9 I)."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(mean, group["momentum"]).flatten(1)                # Nesterov: one gradient ahead
                turned, X = X.size(0) > X.size(1), X / (X.norm() + 1e-7)           # singular values s in [0, 1]
                X = X.T if turned else X
                # Newton-Schulz: five rounds X <- M X, each takes s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. Q = M5 ... M1.
                A, Q = X @ X.T, None
                for _ in range(5):
                    M = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)           # -4.775 A + 2.0315 A A
                    M.diagonal().add_(3.4445)
                    A, Q = M @ A @ M, M if Q is None else M @ Q
                X = Q @ X
                # Entries of about 0.2 lr, as AdamW's steps have (Liu et al. 2025): one learning rate serves both.
                p.add_((X.T if turned else X).view_as(p), alpha=-0.2 * group["lr"] * max(X.shape) ** 0.5)

def learning_rate(step, steps, peak):
    """Warm up for 100 steps, while averages are empty; from half-way fall to 0. (A cosine costs the VAE half a dB.)"""
    return peak * min((step + 1) / min(100, steps), 2 - 2 * step / steps, 1)

class Learner:
    """A model while it learns: its optimizers, and the moving average of its weights, which is what training is for.

    Muon takes the matrices inside; AdamW the rest: gains and biases, which have no directions to even out, embeddings,
    what embeds time and text, conv_in and conv_out. `average` is the weights' moving average (EMA), in a long run
    over the last 200 steps, fewer at first: the jitter of single steps cancels out, and what is drawn is better.
    float16 ends at 65,504 and starts at 6e-8: the scaler keeps gradients between, and skips a step where it cannot.
    loss_of(model, *batch) -> (loss, {name: number}). settings: what another run must share to go on with this one."""
    def __init__(self, model, loss_of, dtype=torch.float32, settings=(), name="learning"):
        self.name, self.settings, self.rows, self.done = name, dict(settings), [], 0        # rows: a log; done: steps
        self.model, self.dtype, self.device = model.requires_grad_(True).train(), dtype, next(model.parameters()).device
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        outer = re.compile(r"embedding|conv_in\.weight|conv_out\.weight")
        inner = {name for name, p in model.named_parameters() if p.dim() > 1 and not outer.search(name)}
        self.muon, self.adamw = Muon([p for name, p in model.named_parameters() if name in inner]), torch.optim.AdamW(
            [p for name, p in model.named_parameters() if name not in inner], weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.parts = {name: getattr(self, name) for name in ("model", "average", "muon", "adamw", "scaler")}
        loss = torch.nn.Module()                                   # its forward is the loss: DistributedDataParallel
        loss.model, loss.forward = model, lambda *batch: loss_of(model, *batch)     # wraps modules, and makes of all
        self.loss = loss if WORLD == 1 else DistributedDataParallel(loss)           # processes' gradients their mean

    def state_dict(self):
        return dict(settings=self.settings, rows=self.rows, step=self.done,
                    **{name: part.state_dict() for name, part in self.parts.items()})
    def load_state_dict(self, saved):
        """Go on where the other stood. ValueError names the settings that it does not share."""
        was, now = saved["settings"], self.settings
        other = [f"--{k.replace('_', '-')} was {was.get(k)} and is {v}" for k, v in now.items() if was.get(k) != v]
        if other:
            raise ValueError("; ".join(other))
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.rows, self.done = saved["rows"], saved["step"]
    def gradient(self, batches, stop=()):
        """The mean gradient of some batches, cut down to a norm of 1: one odd batch must not do much harm.
        -> ({name: mean}, does any process want to stop?). ArithmeticError where loss or gradient are no numbers."""
        sums = {}
        for k, batch in enumerate(batches):                        # processes exchange gradients after the last
            alone = WORLD > 1 and k + 1 < len(batches)
            with self.loss.no_sync() if alone else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss, numbers = self.loss(*batch)
                self.scaler.scale(loss / len(batches)).backward()
            for name, value in {"loss": loss.detach(), **numbers}.items():
                sums.setdefault(name, []).append(float(value))
        self.scaler.unscale_(self.muon)
        self.scaler.unscale_(self.adamw)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        told = torch.tensor([sum(sums["loss"]), len(stop)], device=self.device)
        if WORLD > 1: torch.distributed.all_reduce(told)           # all go on, or all stop
        if not math.isfinite(told[0] + (0 if self.scaler.is_enabled() else self.norm)):     # float16 has its scaler
            raise ArithmeticError(f"{self.name}, step {self.done}: loss {told[0]}, gradient {self.norm}: lower --lr")
        return {name: sum(values) / len(values) for name, values in sums.items()}, told[1] > 0
    @torch.no_grad()
    def step(self, lr):
        """One step at learning rate lr: first the weights, then their average."""
        for optimizer in (self.muon, self.adamw):
            optimizer.param_groups[0]["lr"] = lr
            if math.isfinite(self.norm):                           # it is not where float16 has overflowed
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        for a, p in zip(self.average.parameters(), self.model.parameters()):
            a.lerp_(p, 1 - min(0.995, (1 + self.done) / (10 + self.done)))
        self.done += 1

# ---- Guidance --------------------------------------------------------------------------------------------------------
def guide(cond, uncond, w):
    """Classifier-free guidance, w * (cond - uncond) + uncond (Ho & Salimans 2022, Eq. 6, their weight being w - 1).

    w = 0 leaves the prompt out, w = 1 is the plain conditional model, w > 1 exaggerates what a prompt adds. A negative
    prompt replaces the empty one in uncond. Earlier models followed the gradient of log p(prompt|x_t), a classifier
    trained on noisy pictures: by Bayes' rule that is, times a factor, cond - uncond. Dropped captions teach uncond."""
    return w * (cond - uncond) + uncond

def guided(unet, context, w, seen=None):
    """unet(z, t (B,), context) -> the model(z, t) that samplers ask, t an int, with guidance of weight w.

    context (2*B, M, D): the text states of what to avoid, then of the prompts; (B, M, D), of the prompts, where w = 1.
    seen (B, 5, h, w): what an inpainting model sees beside z: the mask, and the latents of what is kept."""
    def model(z, t):                                               # (B, 4, h, w), int -> eps or v, (B, 4, h, w)
        x = z if seen is None else torch.cat([z, seen], dim=1)
        x = torch.cat([x] * (len(context) // len(z))).to(context.dtype)             # both branches in one batch
        out = unet(x, torch.full((len(x),), t, device=x.device), context).float()
        return out if len(x) == len(z) else guide(out[len(z):], out[:len(z)], w)
    return model

def pin(schedule, model, known, mask):
    """A model that has nothing left to guess where mask (1, 1, h, w) is 0: there the picture is `known` (B, 4, h, w).

    Inpainting with any model, any sampler: of each predicted x_0, the part to keep is put back in its place."""
    def pinned(x, t):
        x0, _ = schedule.x0_and_eps(model(x, t).float(), x, t)
        x0, abar = mask * x0 + (1 - mask) * known, schedule.alpha_bar[t].item()
        eps = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5           # Eq. 4 solved for eps
        return schedule.velocity(x0, t, eps) if schedule.prediction_type == "v_prediction" else eps
    return pinned

# ---- Sampling --------------------------------------------------------------------------------------------------------
# Each sampler takes model(x_t, t) -> eps or v with an int t, a start x (B, ...) at the noise level of the first t, and
# times [(t, t_prev), ...] from `timesteps`. It yields (x, x0) after every step: where it is now, and the picture it is
# heading for. The last x is the result. All arithmetic is float32, whatever the model computes in.

def predict(schedule, model, x, t):
    """Ask the model at (x, t) -> (x0, eps), each like x."""
    x0, eps = schedule.x0_and_eps(model(x, t).float(), x, t)
    return (x0.clamp(-1, 1) if schedule.clip_sample else x0), eps  # clipping is for models of pixels, not of latents

def ddpm(schedule, model, x, times, randn=torch.randn_like):
    """Ancestral sampling (DDPM, Algorithm 2): step to a draw from the posterior, as if the guessed x_0 were true."""
    for t, t_prev in times:
        x0, _ = predict(schedule, model, x, t)
        mean, variance = schedule.posterior(x0, x, t, t_prev)
        # The noise stands for what x_t cannot know about x_prev. At the end x_0 is all there is left to know: the
        # posterior's variance is 0, and its mean is x_0. The last step adds none.
        x = mean + variance ** 0.5 * randn(x) if t_prev >= 0 else mean
        yield x, x0

def ddim(schedule, model, x, times, randn=torch.randn_like, eta=0.0):
    """DDIM (Song et al. 2020, Eq. 12; their alpha is abar here): take the noise out, put it back in at the lower level.

    Training (DDPM's Eq. 14) saw q(x_t | x_0) alone, not q(x_t | x_{t-1}): any process with those marginals will do.
    This one needs no fresh noise (eta = 0): long strides work, the start alone decides the picture. eta = 1 is DDPM."""
    end = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bar[0].item()
    for t, t_prev in times:
        x0, eps = predict(schedule, model, x, t)
        abar = schedule.alpha_bar[t].item()
        abar_prev = schedule.alpha_bar[t_prev].item() if t_prev >= 0 else end
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))             # Eq. 16
        sigma = sigma if t_prev >= 0 else 0.0                                                      # no fresh one last
        x = abar_prev ** 0.5 * x0 + (1 - abar_prev - sigma ** 2) ** 0.5 * eps                      # Eq. 12
        if sigma > 0:
            x = x + sigma * randn(x)
        yield x, x0

def dpmpp(schedule, model, x, times, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): DDIM's step, with a guess at where x_0 is moving.

    DDIM is the first-order solution of an ordinary differential equation in lambda = log(alpha / sigma), where alpha =
    sqrt(abar) and sigma = sqrt(1 - abar): it treats the predicted x_0 as constant over the step. Extending the line
    through the last two predictions to the step's middle makes it second order, at no extra call of the model.
    Deterministic: randn is unused."""
    def level(t):                                                  # alpha, sigma, lambda
        alpha, sigma = schedule.alpha_bar[t].item() ** 0.5, (1 - schedule.alpha_bar[t].item()) ** 0.5
        return alpha, sigma, math.log(alpha / sigma)
    last_x0 = last_h = None
    for t, t_prev in times:
        x0, _ = schedule.x0_and_eps(model(x, t).float(), x, t)     # never clipped, as published
        if t_prev < 0:                                             # lambda is infinite there, and the step ends at x_0
            yield x0, x0
            return
        (_, sigma, lam), (alpha_prev, sigma_prev, lam_prev) = level(t), level(t_prev)
        h = lam_prev - lam                                         # the step, in lambda
        D = x0 if last_x0 is None else x0 + h / (2 * last_h) * (x0 - last_x0)      # Algorithm 2: x_0 at mid-step
        x = sigma_prev / sigma * x - alpha_prev * math.expm1(-h) * D
        last_x0, last_h = x0, h
        yield x, x0

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp}            # one more? Also into sample.py's SAMPLER_NAMES
