"Going on from somebody's model: whole or by LoRA, in the time there is."

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_train import events, last_checkpoint, parts, same_result, send_signal, toy, trained, worker  # noqa: F401 (fixtures among them)


def unet(folder):
    return load_file(folder / 'unet' / 'diffusion_pytorch_model.safetensors')


def far(a, b):
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


@pytest.fixture(scope='module')
def tuned(toy, parts):
    "A whole model and one with LoRA, from the same base, and the base's own schedule in place of the settings'."
    base = shutil.copytree(parts, parts.parent / 'base')
    file = base / 'scheduler' / 'scheduler_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(prediction_type='epsilon', beta_end=0.02)))
    out = {}
    for name, how in (('whole', {}), ('lora', dict(train__lora_rank=2, train__lr=0.01))):
        ws = toy(name, train__init=str(base), train__epochs=2, train__keep_checkpoints=2, **how)
        assert worker(ws).exitcode == 0, events(ws)[-1:]
        out[name] = ws
    return base, out


def test_begins_as_the_base_and_keeps_its_question(toy, tuned):
    base, out = tuned
    ws = toy('still', train__init=str(base), train__lr=1e-12, train__epochs=0.2)
    assert worker(ws).exitcode == 0
    assert far(unet(base), unet(ws.candidate)) < 1e-6 < 1e-3 < far(unet(base), unet(out['whole'].candidate))
    config = json.loads((ws.candidate / 'scheduler' / 'scheduler_config.json').read_text())
    assert (config['prediction_type'], config['beta_end']) == ('epsilon', 0.02)


def test_lora_trains_little_and_opens_in_diffusers(tuned):
    from diffusers import StableDiffusionPipeline

    base, ws = tuned[0], tuned[1]['lora']
    kept, facts = last_checkpoint(ws)[0]['weights'], trained(ws)
    assert (
        kept
        and all('lora_' in k for k in kept)
        and 0 < facts['trained'] == sum(v.numel() for v in kept.values()) < 0.2 * facts['parameters']
    )
    changed = {k for k, v in unet(ws.candidate).items() if (v - unet(base)[k]).abs().max() > 1e-4}
    assert changed and all(
        any(f'.{l}.' in k for l in ('to_q', 'to_k', 'to_v', 'to_out.0')) for k in changed
    ), changed
    draw = lambda pipe: torch.from_numpy(
        pipe(
            'a rose', num_inference_steps=3, output_type='np', generator=torch.Generator().manual_seed(0)
        ).images
    )
    pipe = StableDiffusionPipeline.from_pretrained(base)
    plain = draw(pipe)
    pipe.load_lora_weights(ws.candidate / 'lora')
    whole = draw(StableDiffusionPipeline.from_pretrained(ws.candidate, scheduler=pipe.scheduler))
    assert (draw(pipe) - whole).abs().max() < 1e-3 < 1e-2 < (plain - whole).abs().max()


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
    p = worker(ws, wait=lambda es: any(e['event'] == 'checkpoint' and e['step'] >= 4 for e in es))
    send_signal(p, signal.SIGKILL)
    assert worker(ws).exitcode == 0 and trained(ws)['resumed_from'] >= 4
    same_result(ws, tuned[1]['lora'])


def test_another_base_is_another_run_and_a_wrong_one_is_told(toy, tuned, tmp_path):
    from flowerdiff.core.schema import UserError
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.training.worker import run_fingerprint

    base, ws = tuned[0], tuned[1]['whole']
    other = shutil.copytree(base, tmp_path / 'other')
    file = other / 'unet' / 'diffusion_pytorch_model.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    at = lambda **how: run_fingerprint(
        open_workspace(ws.root, overrides={k.replace('__', '.'): v for k, v in how.items()})
    )
    assert len({at(), at(train__init=str(other)), at(train__init='')}) == 3
    with pytest.raises(UserError, match='train.init.*pinned to a commit'):
        at(train__init='CompVis/stable-diffusion-v1-4')
    with pytest.raises(UserError, match='train.lora_rank: 4 adds to a model'):
        at(train__init='', train__lora_rank=4)
    config = other / 'unet' / 'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(cross_attention_dim=48)))
    wrong = toy('wrong', train__init=str(other))
    assert worker(wrong).exitcode == 2
    assert '\n' not in events(wrong)[-1]['message'] and str(other) in events(wrong)[-1]['message']


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
    assert 20 < trained(ws)['steps'] < 8000 and steps[-1]['lr'] < 0.3 * max(
        e['lr'] for e in steps
    )  # it came down as at the end of any run
