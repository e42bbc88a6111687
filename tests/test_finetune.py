"Fine-tuning a base model: all weights or LoRA, within a time limit."

import json
import shutil
import signal

import pytest
import test_train
import torch
from safetensors.torch import load_file
from test_train import events, last_checkpoint, same_result, send_signal, trained, worker

parts = test_train.parts  # fixtures
toy = test_train.toy


def unet(folder):
    return load_file(folder / 'unet' / 'diffusion_pytorch_model.safetensors')


def largest_difference(a, b):
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.fixture(scope='module')
def tuned(toy, parts):
    "A base model whose noise schedule differs from the settings, fine-tuned as a whole and with LoRA."
    base = shutil.copytree(parts, parts.parent / 'base')
    file = base / 'scheduler' / 'scheduler_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(prediction_type='epsilon', beta_end=0.02)))
    workspaces = {}
    for name, settings in dict(whole={}, lora=dict(train__lora_rank=2, train__lr=0.01)).items():
        ws = toy(name, train__init=str(base), train__epochs=2, train__keep_checkpoints=2, **settings)
        assert worker(ws).exitcode == 0, events(ws)[-1:]
        workspaces[name] = ws
    return base, workspaces


def test_starts_from_the_base_and_keeps_its_prediction_type(toy, tuned):
    base, workspaces = tuned
    ws = toy('still', train__init=str(base), train__lr=1e-12, train__epochs=0.2)
    assert worker(ws).exitcode == 0
    assert largest_difference(unet(base), unet(ws.candidate)) < 1e-6
    assert largest_difference(unet(base), unet(workspaces['whole'].candidate)) > 1e-3
    config = json.loads((ws.candidate / 'scheduler' / 'scheduler_config.json').read_text())
    assert (config['prediction_type'], config['beta_end']) == ('epsilon', 0.02)


def test_lora_trains_little_and_opens_in_diffusers(tuned):
    from diffusers import StableDiffusionPipeline

    base, workspaces = tuned
    ws = workspaces['lora']
    saved = last_checkpoint(ws)[0]['weights']
    assert saved and all('lora_' in name for name in saved)
    facts = trained(ws)
    assert 0 < facts['trained'] == sum(w.numel() for w in saved.values()) < 0.2 * facts['parameters']

    before = unet(base)
    changed = {name for name, w in unet(ws.candidate).items() if (w - before[name]).abs().max() > 1e-4}
    layers = ('.to_q.', '.to_k.', '.to_v.', '.to_out.0.')
    assert changed and all(any(layer in name for layer in layers) for name in changed), changed

    def generate(pipe):
        rng = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe('a rose', num_inference_steps=3, output_type='np', generator=rng).images)

    pipe = StableDiffusionPipeline.from_pretrained(base)
    plain = generate(pipe)
    pipe.load_lora_weights(ws.candidate / 'lora')
    merged = generate(StableDiffusionPipeline.from_pretrained(ws.candidate, scheduler=pipe.scheduler))
    assert (generate(pipe) - merged).abs().max() < 1e-3
    assert (plain - merged).abs().max() > 1e-2


def test_lora_killed_and_started_again_is_the_same_run(toy, tuned):
    ws = toy(
        'killed',
        train__init=str(tuned[0]),
        train__epochs=2,
        train__keep_checkpoints=2,
        train__lora_rank=2,
        train__lr=0.01,
        train__checkpoint_minutes=1e-4,
    )
    process = worker(ws, wait=lambda found: any(e['event'] == 'checkpoint' and e['step'] >= 4 for e in found))
    send_signal(process, signal.SIGKILL)
    assert worker(ws).exitcode == 0 and trained(ws)['resumed_from'] >= 4
    same_result(ws, tuned[1]['lora'])


def test_another_base_is_another_run_and_a_wrong_one_is_reported(toy, tuned, tmp_path):
    from flowerdiff.core.errors import UserError
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.training.worker import run_fingerprint

    base, workspaces = tuned
    other = shutil.copytree(base, tmp_path / 'other')
    file = other / 'unet' / 'diffusion_pytorch_model.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def fingerprint_with(**settings):
        overrides = {f'train.{name}': value for name, value in settings.items()}
        return run_fingerprint(open_workspace(workspaces['whole'].root, overrides=overrides))

    assert len({fingerprint_with(), fingerprint_with(init=str(other)), fingerprint_with(init='')}) == 3
    with pytest.raises(UserError, match=r'train.init.*pinned to a commit'):
        fingerprint_with(init='CompVis/stable-diffusion-v1-4')
    with pytest.raises(UserError, match=r'train.lora_rank: 4 adds to a model'):
        fingerprint_with(init='', lora_rank=4)
    config = other / 'unet' / 'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(cross_attention_dim=48)))
    wrong = toy('wrong', train__init=str(other))
    assert worker(wrong).exitcode == 2
    message = events(wrong)[-1]['message']
    assert '\n' not in message
    assert str(other) in message


def test_ends_when_the_time_ends(toy):
    ws = toy(
        'hurried',
        train__epochs=1000,
        train__max_hours=12 / 3600,
        train__samples_every=10**6,
        train__validate_every=10**6,
    )
    assert worker(ws).exitcode == 0
    notes = [e['text'] for e in events(ws) if e['event'] == 'note' and 'max_hours' in e['text']]
    assert notes and ' of 8,000 steps' in notes[0]
    steps = [e for e in events(ws) if e['event'] == 'step']
    assert 20 < trained(ws)['steps'] < 8000
    assert steps[-1]['lr'] < 0.3 * max(e['lr'] for e in steps), 'the learning rate fell to the end'
