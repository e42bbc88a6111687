"Noise schedules, samplers and the gate: what is compared is comparable, and what is accepted can be sampled."

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ImageOps

from flowerdiff.core.errors import UserError
from flowerdiff.models.diffusion import (
    betas,
    flow_scale,
    make_scheduler,
    min_snr_weight,
    noise_levels,
    prediction_target,
    sampling_scheduler,
    snr,
    to_velocity,
)

STD = 1.2  # of the Gaussian data


def settings(**changes):
    defaults = dict(
        timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        prediction_type='v_prediction',
        zero_terminal_snr=False,
        flow_shift=1.0,
    )
    return SimpleNamespace(**defaults | changes)


class IdealDenoiser:
    "The best denoiser of Gaussian data, with an error of its output."

    device = 'cpu'

    def __init__(self, scheduler, prediction_type: str, error: float):
        self.levels = noise_levels(scheduler)
        self.prediction_type = prediction_type
        self.error = error
        self.rng = torch.Generator().manual_seed(5)

    def condition(self, text):
        return text

    def denoise(self, x, t, text):
        a = self.levels[int(t)].view(1, 1, 1, 1)
        noisy = x / flow_scale(a) if self.prediction_type == 'flow_prediction' else x
        x0 = a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * noisy
        output = prediction_target(x0, (noisy - a.sqrt() * x0) / (1 - a).sqrt(), a, self.prediction_type)
        return output + self.error * torch.randn(output.shape, generator=self.rng)


def sampled_std(train, name: str | None, steps: int, error: float = 0.0) -> float:
    "Sample with a named scheduler ('few': that of a student) from the configuration that a model folder has."
    from flowerdiff.inference.sampling_loop import generators, load_scheduler, sample
    from flowerdiff.training.distillation import few_steps

    scheduler = make_scheduler(train)
    saved = dict(sampling_scheduler(scheduler.config).config, _class_name='DPMSolverMultistepScheduler')
    sampler = few_steps(saved) if name == 'few' else load_scheduler(saved, name)
    model = IdealDenoiser(scheduler, train.prediction_type, error)
    options = dict(steps=steps, guidance=1.0, shape=(1, 8, 8))
    return sample(model, torch.zeros(24, 1, 1), None, generators(0, 24), sampler, **options).std().item()


def accepted():
    "Every prediction type, schedule, number of timesteps and end that the settings accept."
    kinds = ('v_prediction', 'epsilon')
    schedules = ('linear', 'scaled_linear', 'squaredcos_cap_v2')
    for kind, schedule, timesteps, zero in itertools.product(kinds, schedules, (1000, 100), (False, True)):
        if not (zero and kind == 'epsilon'):
            changes = dict(prediction_type=kind, beta_schedule=schedule, timesteps=timesteps)
            yield settings(**changes, zero_terminal_snr=zero)
    for shift in (1.0, 3.0):
        yield settings(prediction_type='flow_prediction', flow_shift=shift)


@pytest.mark.parametrize('train', list(accepted()), ids=lambda x: '-'.join(str(v) for v in vars(x).values()))
def test_every_sampler_keeps_the_spread_of_the_data(train):
    "Pictures of an almost ideal denoiser (off by 0.003, as trained ones are) have the spread of the data."
    is_flow = train.prediction_type == 'flow_prediction'
    cosine_epsilon = train.prediction_type == 'epsilon' and train.beta_schedule == 'squaredcos_cap_v2'
    for name in (None, 'dpm') if cosine_epsilon or is_flow else (None, 'ddim', 'euler', 'unipc'):
        assert sampled_std(train, name, 20, error=0.003) == pytest.approx(STD, abs=0.15), name
    assert sampled_std(train, 'few', 8, error=0.003) == pytest.approx(STD, abs=0.3)
    if train.timesteps == 100 and not cosine_epsilon:
        assert sampled_std(train, 'ddpm', 100) == pytest.approx(STD, abs=0.15)


@pytest.mark.parametrize('name', ['ddim', 'ddpm', 'euler', 'unipc', 'lcm'])
def test_a_sampler_that_ruins_pictures_is_refused(name):
    with pytest.raises(UserError, match='use dpm'):
        sampled_std(settings(prediction_type='epsilon', beta_schedule='squaredcos_cap_v2'), name, 20)


@pytest.mark.parametrize('schedule', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_every_number_of_timesteps_ends_at_the_same_noise(schedule):
    thousand = make_scheduler(settings(beta_schedule=schedule))
    assert thousand.config.trained_betas is None
    assert torch.allclose(thousand.betas, betas(schedule), rtol=1e-5)
    for n in (10, 200, 501, 2000):
        short = make_scheduler(settings(beta_schedule=schedule, timesteps=n))
        assert len(short.alphas_cumprod) == n
        if schedule != 'squaredcos_cap_v2':
            assert short.alphas_cumprod[-1] == pytest.approx(thousand.alphas_cumprod[-1].item(), rel=1e-3)
        assert short.alphas_cumprod[-1] < 0.005


def test_min_snr_weights_of_the_garden_are_those_of_the_paper():
    "And those of zero terminal SNR and of rectified flow do not vanish at pure noise."
    ratio = snr(make_scheduler(settings()).alphas_cumprod)
    assert torch.equal(min_snr_weight(ratio), ratio.clamp(max=5.0) / (ratio + 1))
    zero = snr(make_scheduler(settings(zero_terminal_snr=True)).alphas_cumprod)
    flow = snr(noise_levels(make_scheduler(settings(prediction_type='flow_prediction'))))
    assert min_snr_weight(zero)[-1] > 0.004
    assert min_snr_weight(flow, prediction='flow_prediction')[-1] > 0.004


@dataclass
class Function:
    "A model for `measure_alike` that is a function of the noisy latents."

    folder: str
    abar: torch.Tensor
    prediction_type: str
    factor: float = 1.0  # of the predicted velocity

    def load(self):
        return self

    def to(self, device):
        return self

    training = False

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, inputs, timesteps, encoder_hidden_states):
        a = torch.from_numpy(np.interp(timesteps, np.arange(len(self.abar)), self.abar)).float()
        a = a.view(-1, 1, 1, 1)
        noisy = inputs / flow_scale(a) if self.prediction_type == 'flow_prediction' else inputs
        x0 = self.factor * 0.5 * a.sqrt() * noisy
        eps = (noisy - a.sqrt() * x0) / (1 - a).sqrt()
        return SimpleNamespace(sample=prediction_target(x0, eps, a, self.prediction_type))


def compared(champion, candidate, levels):
    from flowerdiff.data.batches import toy_split
    from flowerdiff.training.common_levels import measure_alike

    split = toy_split(16, kinds=2)
    return measure_alike(champion, candidate, levels, lambda folder: split)


def test_the_same_model_in_another_dress_is_no_better():
    "The same function as v, epsilon and flow, with 1000 and 200 timesteps: a gain of nothing."
    thousand = noise_levels(make_scheduler(settings()))
    short = noise_levels(make_scheduler(settings(timesteps=200)))
    flow = noise_levels(make_scheduler(settings(prediction_type='flow_prediction')))
    champion = Function('a', thousand, 'v_prediction')
    levels = thousand[[50, 350, 650, 950, 999]].tolist()
    for abar, kind in ((thousand, 'epsilon'), (short, 'v_prediction'), (flow, 'flow_prediction')):
        losses = compared(champion, Function('b', abar, kind), levels)
        assert np.mean(losses.champion) == pytest.approx(np.mean(losses.candidate), rel=2e-3), kind
    better = compared(champion, Function('b', thousand, 'epsilon', factor=1.2), levels)
    assert np.mean(better.candidate) < 0.99 * np.mean(better.champion)


def test_levels_that_a_schedule_does_not_reach_are_left_out():
    thousand = noise_levels(make_scheduler(settings()))
    old = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 200) ** 2).cumprod(0)  # ends at 34 % of the signal
    levels = thousand[[50, 350, 650, 950]].tolist()
    losses = compared(Function('a', old, 'v_prediction'), Function('b', thousand, 'v_prediction'), levels)
    assert losses.note.startswith('compared at 2 noise levels') and losses.note.endswith('reach them: 2')


def test_epsilon_and_velocity_are_the_same_error():
    "Guards `weigh_alike`: at one level the ratio of two errors does not depend on the prediction type."
    x0, noise, wrong = torch.randn(3, 8, 1, 4, 4)
    a = torch.full((8, 1, 1, 1), 0.01)
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    velocities = [to_velocity(noise + k * wrong, noisy, a, 'epsilon') for k in (0.0, 1.0, 2.0)]
    errors = [(v - velocities[0]).square().mean() for v in velocities[1:]]
    assert errors[1] / errors[0] == pytest.approx(4.0, rel=1e-3)


@pytest.fixture
def gate(tmp_path):
    from flowerdiff.core.checksums import write_checksums
    from flowerdiff.core.files import read_json, write_json
    from flowerdiff.core.workspace import demo_workspace

    ws = demo_workspace('promote', copy_to=tmp_path / 'demo')
    trained = read_json(ws.root / 'train.json')
    trained['validation']['by_picture'] = [0.5 * x for x in trained['validation']['by_picture']]
    write_json(ws.root / 'train.json', trained | dict(run_id='lower loss'))
    config = ws.candidate / 'unet' / 'config.json'
    write_json(config, read_json(config) | dict(pretended='lower loss'))
    write_checksums(ws.candidate)
    return ws


@pytest.mark.parametrize('gray', [False, True])
def test_a_lower_loss_with_worse_drawings_is_not_promoted(gate, monkeypatch, gray):
    from flowerdiff.evaluation import drawing_check
    from flowerdiff.evaluation.image_rows import open_pictures
    from flowerdiff.stages.promote import run

    def draw(ws, folder, prompts):  # the pictures that the prompts were made of
        drawn = open_pictures(ws.pictures / 'val', names=[p.file for p in prompts])
        spoiled = gray and folder == ws.candidate
        return [ImageOps.grayscale(x).convert('RGB') for x in drawn] if spoiled else drawn

    monkeypatch.setattr(drawing_check, '_draw', draw)
    result = run(gate.root)
    assert result.promoted is not gray
    assert ('are worse' in result.summary) == gray and 'color' in result.summary


def test_a_candidate_that_cannot_draw_is_not_promoted(gate, monkeypatch):
    from flowerdiff.evaluation import drawing_check
    from flowerdiff.stages.promote import run

    def draw(ws, folder, prompts):
        if folder == ws.candidate:
            raise UserError('its weights are not numbers')
        return []

    monkeypatch.setattr(drawing_check, '_draw', draw)
    result = run(gate.root)
    assert not result.promoted and 'cannot draw (its weights are not numbers)' in result.summary


def test_few_pictures_say_how_many_it_takes():
    from flowerdiff.evaluation.gate import compare

    assert 'validation images can never reach it, 7 can' in compare([1.0] * 6, [0.1] * 6).reason
    assert compare([1.0] * 7, [0.1] * 7).better


def test_no_profile_promotes_another_seed():
    from flowerdiff.core.profiles import load_profile, profiles

    for name in profiles():
        settings = load_profile(name)
        seeds_differ_by = 0.0025 if settings.train.init else 0.0135  # benchmarks/README.md, The gate
        assert settings.promote.margin >= seeds_differ_by, name
