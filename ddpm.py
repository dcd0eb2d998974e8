"""Diffusion: how noise is added, why predicting it is enough to generate, three ways to walk back.

    symbol                  name here     what it is                                      equation
    beta_t                  beta          variance of the noise added at step t           DDPM 2
    alpha_t                 1 - beta      how much signal power step t keeps              DDPM 4
    abar_t                  alpha_bar     alpha_1 * ... * alpha_t: how much is left       DDPM 4
    q(x_t | x_{t-1})        -             N(sqrt(alpha_t) x_{t-1}, beta_t I)              DDPM 2
    q(x_t | x_0)            q_sample      N(sqrt(abar_t) x_0, (1 - abar_t) I)             DDPM 4
    q(x_{t-1} | x_t, x_0)   posterior     N(mu~_t, beta~_t I)                             DDPM 6, 7
    SNR(t)                  snr           abar_t / (1 - abar_t)

The forward process drowns a picture in noise, a little at every step, and learns nothing. Here is
why all steps up to t are one large step. Put step t - 1 into step t; e and e' are from N(0, I):

    x_t = sqrt(alpha_t) x_{t-1} + sqrt(1 - alpha_t) e
        = sqrt(alpha_t) (sqrt(alpha_{t-1}) x_{t-2} + sqrt(1 - alpha_{t-1}) e') + sqrt(1 - alpha_t) e

The two noises are independent, so their variances add: alpha_t (1 - alpha_{t-1}) + (1 - alpha_t) is
1 - alpha_t alpha_{t-1}. So two steps are one step that keeps alpha_t alpha_{t-1}. Repeat down to
x_0 and the kept power is abar_t:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   eps ~ N(0, I)                         (Eq. 4)

So training can jump to any t. Going back needs q(x_{t-1} | x_t), which nobody knows. But if x_0 is
known as well, Bayes' rule for Gaussians gives it: a Gaussian with the mean (Eq. 6 and 7)

    mu~_t = (sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)

So a network predicts x_0, or what comes to the same by Eq. 4, the noise eps, and we take the step
with the prediction in place of the truth.

Why is a squared error in eps the right loss? The negative ELBO (Eq. 5) is a sum over t:

    L_T       KL(q(x_T | x_0) || N(0, I))                            no parameters, nearly 0
    L_{t-1}   KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))    one for each step
    L_0       -log p_theta(x_0 | x_1)                                the last step

p_theta is the posterior with the predicted x_0, so both Gaussians of L_{t-1} have the same variance
beta~_t, and their KL is |difference of the means|^2 / (2 beta~_t) (Eq. 8). The means differ by
beta_t / (sqrt(alpha_t) sqrt(1 - abar_t)) (eps - eps_theta), from Eq. 7 and 4. So (Eq. 12)

    L_{t-1} = E[beta_t^2 / (2 beta~_t alpha_t (1 - abar_t)) |eps - eps_theta|^2]     for t > 1

With all these weights set to 1 it is the simple loss (Eq. 14). That spends more on large t than the
bound does, and draws better pictures. diffusion_loss can also weigh otherwise (min-SNR).

Papers: Ho et al. 2020 (DDPM); Song et al. 2020 (DDIM); Lu et al. 2022 (DPM-Solver++); Ho & Salimans
2022 (classifier-free guidance); Salimans & Ho 2022 (v-prediction); Hang et al. 2023 (min-SNR); Lin
et al. 2023 (zero terminal SNR).

Letters: T diffusion steps, 1000; B batch; x is whatever is diffused, of any shape (B, ...): for
Stable Diffusion latents (B, 4, h, w). The code counts t from 0, the paper from 1: t = 0 here is its
t = 1. Before t = 0, abar is 1. Before this file: vae.py, clip_encoder.py. Read next: unet.py.
"""
import math
import numpy as np
import torch

# ---- The forward process -------------------------------------------------------------------------

class NoiseSchedule:
    """The constants of the forward process. `NoiseSchedule()` is Stable Diffusion 1.5's."""

    DEFAULTS = dict(
        num_train_timesteps=1000,          # T
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",     # or linear, squaredcos_cap_v2 (cosine)
        prediction_type="epsilon",         # what the network predicts; or v_prediction
        rescale_betas_zero_snr=False,      # True: the last step is pure noise
        timestep_spacing=None,             # leading, trailing, linspace or None: see timesteps
        steps_offset=1,                    # added to t if the spacing is leading
        set_alpha_to_one=False,            # False: DDIM's last step ends at abar_0, not at 1
    )

    def __init__(self, **config):
        self.config = config = {**self.DEFAULTS, **config}
        self.T = T = config["num_train_timesteps"]
        self.prediction_type = config["prediction_type"]
        start, end, kind = config["beta_start"], config["beta_end"], config["beta_schedule"]
        double = dict(dtype=torch.float64, device="cpu")
        if kind == "linear":                                   # DDPM, section 4
            beta = torch.linspace(start, end, T, **double)
        elif kind == "scaled_linear":                          # linear in sqrt(beta)
            beta = torch.linspace(start**0.5, end**0.5, T, **double) ** 2
        elif kind == "squaredcos_cap_v2":                      # Nichol & Dhariwal 2021, Eq. 17
            u = torch.arange(T + 1, **double) / T
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule = {kind!r} is not linear, scaled_linear "
                             "or squaredcos_cap_v2")
        # A product of a thousand factors near 1: multiply in float64, keep in float32.
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        if not (beta.min() > 0 and beta.max() < 1 and alpha_bar[-1].float() > 0):
            raise ValueError(f"beta_start = {start}, beta_end = {end}: beta should be above 0 and "
                             "below 1, and leave some of the signal")
        if config["rescale_betas_zero_snr"]:
            alpha_bar = zero_terminal_snr(alpha_bar)
            beta[1:] = 1 - alpha_bar[1:] / alpha_bar[:-1]
        self.beta = beta.float()
        self.alpha_bar = alpha_bar.float()
        self.snr = (alpha_bar / (1 - alpha_bar)).float()

    @classmethod
    def from_config(cls, config):
        """Build from a published scheduler_config.json (a dict), for whatever sampler it names.

        ValueError names a key that asks for what this code does not do. Unknown keys are ignored.
        """
        for key in ("trained_betas", "thresholding", "use_flow_sigmas"):
            if config.get(key):
                raise ValueError(f"{key} = {config[key]!r} is not supported")
        allowed = dict(
            prediction_type=("epsilon", "v_prediction"),
            timestep_spacing=("leading", "trailing", "linspace"),
            timestep_type=("discrete",),
        )
        for key, values in allowed.items():
            if config.get(key, values[0]) not in values:
                raise ValueError(f"{key} = {config[key]!r} is not {' or '.join(values)}")
        name = config.get("_class_name", "DDIMScheduler")
        if name not in SAME_MODELS:
            raise ValueError(f"_class_name = {name!r} is not supported: its models predict "
                             "something else")
        for key in cls.DEFAULTS:
            if key in config and config[key] is None:
                raise ValueError(f"{key} = null is not supported")
        # What a published config leaves out has diffusers' defaults.
        defaults = dict(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="linear",
            steps_offset=0,
            set_alpha_to_one=True,
        )
        config = {**defaults, **config}
        return cls(**{key: config[key] for key in cls.DEFAULTS if key in config})

    def to_config(self):
        """The dict that belongs in scheduler/scheduler_config.json, with diffusers' keys."""
        config = dict(
            self.config,
            _class_name="DDIMScheduler",
            prediction_type=self.prediction_type,
            clip_sample=False,                         # clipping is for pixels, not for latents
        )
        return {key: value for key, value in config.items() if value is not None}

    def at(self, table, t, x):
        """table[t], shaped to multiply x: t an int -> a float; t (B,) -> (B, 1, ..., 1)."""
        if isinstance(t, int):
            return table[t].item()
        values = table.to(x.device)[t]
        return values.view(-1, *[1 for _ in x.shape[1:]])

    def q_sample(self, x0, t, noise):
        """x_t ~ q(x_t | x_0) (Eq. 4). x0 and noise (B, ...); t (B,) or an int."""
        abar = self.at(self.alpha_bar, t, x0)
        return abar**0.5 * x0 + (1 - abar) ** 0.5 * noise

    def velocity(self, x0, t, noise):
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, section 4).

        Where nearly all is noise, eps says little about the picture, and v is nearly -x_0. Where
        noise is nearly gone, v is nearly eps. It is a question worth asking at every t.
        """
        abar = self.at(self.alpha_bar, t, x0)
        return abar**0.5 * noise - (1 - abar) ** 0.5 * x0

    def x0_and_eps(self, output, x_t, t):
        """The network's output at x_t (eps or v) -> the x_0 and the eps that it stands for."""
        abar = self.at(self.alpha_bar, t, x_t)
        if self.prediction_type == "v_prediction":     # (x_t, v) is (x_0, eps) turned: turn it back
            x0 = abar**0.5 * x_t - (1 - abar) ** 0.5 * output
            eps = abar**0.5 * output + (1 - abar) ** 0.5 * x_t
        else:
            eps = output
            # Eq. 4 solved for x_0. Where abar is 0, x_t is all noise and any x_0 will do.
            x0 = (x_t - (1 - abar) ** 0.5 * eps) / (abar + TINY * (abar == 0)) ** 0.5
        return x0, eps

    def posterior(self, x0, x_t, t, t_prev):
        """Mean and variance of q(x_prev | x_t, x_0) (Eq. 6 and 7). t and t_prev are ints.

        t_prev < t is the time after the step ("previous" as in the paper's t - 1); negative means
        x_0. With t_prev = t - 1 this is the paper's. A longer stride is the same with alpha_t =
        abar_t / abar_prev, all steps in one.
        """
        abar = self.at(self.alpha_bar, t, x_t)
        abar_prev = self.at(self.alpha_bar, t_prev, x_t) if t_prev >= 0 else 1.0
        alpha = abar / abar_prev
        beta = 1 - alpha
        x0_part = abar_prev**0.5 * beta / (1 - abar) * x0
        x_t_part = alpha**0.5 * (1 - abar_prev) / (1 - abar) * x_t
        variance = (1 - abar_prev) / (1 - abar) * beta
        return x0_part + x_t_part, variance

    def timesteps(self, steps, sampler="ddim"):
        """Which of the T times to visit -> [(t, t_prev), ...], from noisy to clean.

        leading     0, k, 2k, ... plus steps_offset, k = T // points: starts short of pure noise
        trailing    T - 1, T - 1 - k, ..., k = T / steps
        linspace    evenly from T - 1 to 0
        points: steps, and one more for DPM-Solver++, which counts x_0 as a point.
        Without a spacing in the config: linspace for DPM-Solver++, else leading. t_prev < 0 stands
        for x_0. ValueError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"--steps {steps} is not between 1 and {self.T}")
        spacing = self.config["timestep_spacing"]
        if spacing is None:
            spacing = "linspace" if sampler == "dpmpp" else "leading"
        points = steps + 1 if sampler == "dpmpp" else steps
        if spacing == "linspace":
            times = np.linspace(0, self.T - 1, points).round()
        elif spacing == "leading":
            times = np.arange(points) * max(self.T // points, 1) + self.config["steps_offset"]
        else:
            times = (np.arange(self.T, 0, -self.T / steps).round() - 1)[:steps]
        times = sorted({int(t) for t in times.clip(0, self.T - 1)}, reverse=True)[:steps]
        if sampler == "ddim":
            # Published DDIM always takes the same stride, wherever the next time of the list is.
            return [(t, t - self.T // steps) for t in times]
        return list(zip(times, times[1:] + [-1]))

# diffusers' samplers for models that predict eps or v.
SAME_MODELS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

def zero_terminal_snr(alpha_bar):
    """alpha_bar (T,), shifted and scaled so that it ends at 0 (Lin et al. 2023, Algorithm 1).

    Other schedules keep a trace of the picture at the last step, its mean above all. Sampling
    starts from noise without it, and so draws neither very dark nor very bright pictures.
    """
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2

TINY = 2**-24    # stands for an abar of 0 where something divides by it, as in diffusers

# ---- The training loss ---------------------------------------------------------------------------

def diffusion_loss(schedule, output, x0, t, noise, min_snr=0.0):
    """The loss of Algorithm 1 for each example, (B,). output: the network's for x_t, (B, ...).

    Eq. 14: the mean squared error in eps, or in v. min_snr > 0 weighs it (Hang et al. 2023, section
    3.4): an error in eps is sqrt(SNR) times that in x_0, an error in v sqrt(SNR + 1) times, so both
    losses weigh small t heavily. With min_snr = gamma the weight of the error in x_0 is
    min(SNR, gamma).
    """
    v_prediction = schedule.prediction_type == "v_prediction"
    target = schedule.velocity(x0, t, noise) if v_prediction else noise
    loss = (output.float() - target.float()).square().flatten(1).mean(dim=1)
    if min_snr > 0:
        snr = schedule.snr.to(t.device)[t].clamp(min=TINY)
        x0_weight = snr + 1 if v_prediction else snr           # that the loss has by itself
        loss = loss * snr.clamp(max=min_snr) / x0_weight
    return loss

# ---- Guidance ------------------------------------------------------------------------------------

def guide(cond, uncond, w):
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6; their weight is w - 1).

    Bayes' rule: log p(x|c) = log p(x) + log p(c|x) + const, c the prompt. eps is minus sqrt(1 -
    abar) times the gradient of log p(x_t). So cond - uncond is the part of eps that makes the
    picture fit the prompt less. Samplers take eps out of x_t: with w times that part, they aim at
    p(x) p(c|x)^w. At a given x_t v is linear in eps, so the same holds for v. w = 0 leaves the
    prompt out, w = 1 takes it as it is, w > 1 exaggerates it. A negative prompt takes the place of
    the empty one in uncond. Dropped captions in training teach uncond to the same network.
    """
    return uncond + w * (cond - uncond)

# ---- Sampling ------------------------------------------------------------------------------------
# A sampler takes model(x_t, t) -> eps or v, with an int t; a start x (B, ...), as noisy as the
# first t; times from `timesteps`; and randn(), which draws noise like x. It yields (x, x0) after
# each step: where it is, and the picture that it is heading for. The last x is the result. The
# arithmetic is float32, whatever the model computes in.

def ddpm(schedule, model, x, times, randn):
    """Ancestral sampling (Algorithm 2): draw from the posterior as if predicted x_0 were true."""
    for t, t_prev in times:
        x0, _ = schedule.x0_and_eps(model(x, t).float(), x, t)
        mean, variance = schedule.posterior(x0, x, t, t_prev)
        # The noise stands for what x_t cannot know about x_prev. The last step adds none: there the
        # posterior's mean is x_0, and its variance 0.
        x = mean
        if t_prev >= 0:
            x = mean + variance**0.5 * randn()
        yield x, x0

def ddim(schedule, model, x, times, randn):
    """DDIM (Song et al. 2020, Eq. 12 with sigma = 0): take the noise out, put less of it back in.

    The loss knows q(x_t | x_0) only, so any process with the same q(x_t | x_0) will do. This one
    adds no fresh noise: x at the start decides the picture, and long strides work. Published models
    end at abar_0, a trace of noise short of x_0.
    """
    end = 1.0 if schedule.config["set_alpha_to_one"] else schedule.alpha_bar[0].item()
    for t, t_prev in times:
        x0, eps = schedule.x0_and_eps(model(x, t).float(), x, t)
        abar_prev = schedule.alpha_bar[t_prev].item() if t_prev >= 0 else end
        x = abar_prev**0.5 * x0 + (1 - abar_prev) ** 0.5 * eps                     # Eq. 12
        yield x, x0

def dpmpp(schedule, model, x, times, randn):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): DDIM, with a look at where x_0 is moving.

    With a = sqrt(abar), s = sqrt(1 - abar), DDIM solves a differential equation in
    lambda = log(a / s) and takes the predicted x_0 as constant over a step. Here a line is drawn
    through the last two predictions, h_last apart in lambda, and read at the middle of the step,
    h / 2 further on. That is second order, and calls the model no more often. It draws no noise.
    """
    x0_last, h_last = None, None
    for t, t_prev in times:
        x0, _ = schedule.x0_and_eps(model(x, t).float(), x, t)
        if t_prev < 0:                                         # lambda is infinite: the step ends
            x = x0                                             # at x_0
        else:
            _, s, lam = a_s_lambda(schedule, t)
            a_prev, s_prev, lam_prev = a_s_lambda(schedule, t_prev)
            h = lam_prev - lam
            D = x0
            if x0_last is not None:
                D = x0 + h / 2 * (x0 - x0_last) / h_last
            x = s_prev / s * x - a_prev * math.expm1(-h) * D
            x0_last, h_last = x0, h
        yield x, x0

def a_s_lambda(schedule, t):
    """Signal a = sqrt(abar), noise s = sqrt(1 - abar), and log(a / s), at an int t."""
    abar = schedule.alpha_bar[t].item() or TINY
    a, s = abar**0.5, (1 - abar) ** 0.5
    return a, s, math.log(a / s)

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp}
