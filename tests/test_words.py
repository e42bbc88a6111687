"The run's own CLIP and its test against chance, training the text encoder with the denoiser, unknown words."

import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
COLORS = dict(
    red=(220, 30, 30), green=(30, 180, 40), blue=(40, 60, 220), yellow=(230, 220, 40), white=(245,) * 3
)
TRAIN = {
    'train.channels': [16, 16],
    'train.attention': [False, True],
    'train.batch_size': 8,
    'train.epochs': 3,
    'train.warmup_steps': 2,
    'train.threads': 1,
    'train.precision': 'fp32',
    'tracking.enabled': False,
}


def color_pictures(n, side=32):
    "Pictures of one color each, and a sentence about it."
    rng = np.random.default_rng(0)
    names = [list(COLORS)[i % len(COLORS)] for i in range(n)]
    plain = np.stack([np.full((side, side, 3), COLORS[name]) for name in names])
    pictures = np.clip(plain + rng.integers(-12, 13, plain.shape), 0, 255).astype(np.uint8)
    return pictures, [[f'a {name} card', f'the card is {name}'] for name in names]


def fit(out, captions=None, steps=60):
    "Train a tiny CLIP on colored cards, with a fifth of them held out."
    from flowerdiff.models.clip import train_clip
    from flowerdiff.models.clip_retrieval import EarlyStopping, HeldOut

    pictures, own = color_pictures(50)
    captions = captions or own
    lines = []
    stopping = EarlyStopping(HeldOut(pictures[40:], captions[40:]), steps, report=lines.append)
    model, tokenizer = train_clip(
        pictures[:40],
        captions[:40],
        out,
        steps=steps,
        width=32,
        layers=1,
        max_length=16,
        progress=lambda line: None,
        monitor=stopping,
    )
    return model, tokenizer, stopping, lines


def test_a_slow_clock_gives_the_same_clip(tmp_path, monkeypatch):
    "The training counts steps: on a machine that needs a minute for each, the weights are the same."
    fast, _, stopping, _ = fit(tmp_path / 'fast', steps=20)
    clock = iter(range(0, 10**9, 60))
    for name in ('time', 'monotonic'):
        monkeypatch.setattr(time, name, lambda: float(next(clock)))
    slow, _, slow_stopping, lines = fit(tmp_path / 'slow', steps=20)
    assert stopping.curve == slow_stopping.curve and len(stopping.curve) > 10
    assert not lines and not slow_stopping.out_of_time
    state = slow.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in fast.state_dict().items())


def test_a_training_beyond_its_minutes_ends_and_says_so(tmp_path, monkeypatch):
    clock = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, 'monotonic', lambda: float(next(clock)))
    *_, stopping, lines = fit(tmp_path / 'clip', steps=20)
    assert stopping.out_of_time and len(lines) == 1 and 'on a faster machine the result differs' in lines[0]
    assert lines[0].startswith('CLIP: stopped by encode.clip_minutes at step ')


def test_right_captions_beat_chance_and_shuffled_ones_do_not(tmp_path):
    from flowerdiff.models.clip_retrieval import HeldOut, check_against_chance

    pictures, captions = color_pictures(80)
    order = np.random.default_rng(1).permutation(len(captions))
    shuffled = [captions[i] for i in order]
    results = {}
    for name, own in (('right', captions), ('shuffled', shuffled)):
        model, tokenizer, *_ = fit(tmp_path / name, own)
        results[name] = check_against_chance(model, tokenizer, HeldOut(pictures[50:], own[50:]))
    assert results['right'].passed and results['right'].p_value < 0.001
    assert not results['shuffled'].passed and 'no better than chance' in results['shuffled'].text


@pytest.fixture(scope='module')
def encoded(tmp_path_factory):
    "A workspace of cards whose captions say nothing about them: its own CLIP cannot learn."
    from flowerdiff.core.workspace import open_workspace, write_jsonl
    from flowerdiff.stages.encode import run as encode

    root = tmp_path_factory.mktemp('words')
    settings = {
        'components.text_encoder': 'train',
        'encode.clip_steps': 4,
        'prepare.resolution': 32,
    }
    ws = open_workspace(root / 'ws', 'garden', settings | TRAIN)
    pictures, _ = color_pictures(40)
    rows = []
    for split, chosen in (('train', range(28)), ('val', range(28, 34)), ('test', range(34, 40))):
        (ws.pictures / split).mkdir(parents=True)
        for i in chosen:
            Image.fromarray(pictures[i]).save(ws.pictures / split / f'{i}.png')
            captions = ['a crimson thing with ruffles', 'a thing']
            rows.append(dict(file_name=f'{split}/{i}.png', captions=captions, captioner='given'))
        names = [dict(file_name=f'{i}.png') for i in chosen]
        write_jsonl(ws.pictures / split / 'metadata.jsonl', names)
    write_jsonl(ws.captions / 'metadata.jsonl', rows)
    result = encode.plain(ws)
    return ws, result


def test_encode_records_why(encoded):
    ws, result = encoded
    facts = json.loads((ws.encoded / 'manifest.json').read_text())['text_encoder']
    assert (facts['setting'], facts['spec'], facts['trained_with_denoiser']) == ('train', 'train', True)
    assert not facts['clip']['test']['passed'] and facts['clip']['complete']
    assert 'text encoder trained with the denoiser' in result.summary
    words = json.loads((ws.encoded / 'vocabulary.json').read_text())
    assert words['words']['crimson'] == 28
    assert {'thi', 'ng</w>', 'ruf'} <= set(words['pieces']), 'a garden: no piece beyond three letters'


@pytest.fixture(scope='module')
def trained(encoded):
    from flowerdiff.training.worker import run_worker

    ws, _ = encoded
    assert run_worker(str(ws.root)) == 0
    shutil.copytree(ws.candidate, ws.model)
    return ws


def test_text_encoder_trains_with_the_denoiser(trained):
    from safetensors.torch import load_file

    start = load_file(trained.encoded / 'components/text_encoder/model.safetensors')
    learned = load_file(trained.candidate / 'text_encoder/model.safetensors')
    assert start.keys() == learned.keys()
    changed = [name for name in start if not torch.equal(start[name], learned[name])]
    assert len(changed) > len(start) / 2, 'the weights of the text encoder have moved'
    report = json.loads((trained.root / 'train.json').read_text())
    assert report['trained'] > sum(x.numel() for x in learned.values())


def test_champion_is_measured_with_its_own_text_encoder(trained):
    "The losses of the gate are those of training, with the texts of the trained encoder."
    from flowerdiff.stages.promote import measure_champion

    validation = json.loads((trained.root / 'train.json').read_text())['validation']
    assert measure_champion(trained, validation['levels']) == pytest.approx(
        validation['by_picture'], rel=2e-3
    )


def test_student_of_such_a_model_is_refused(trained, capsys):
    from flowerdiff.core.errors import UserError
    from flowerdiff.core.workspace import open_workspace
    from flowerdiff.models.joint_denoiser import trains_text_encoder

    distill = open_workspace(trained.root, None, ['train.distill=4'])
    try:
        with pytest.raises(UserError, match=r'train\.distill: the champion trained its text encoder'):
            trains_text_encoder(distill)
    finally:
        open_workspace(trained.root, None, ['train.distill=0'])


def test_python_api_warns_once(trained):
    from flowerdiff.inference.generator import Generator, UnknownWordsWarning

    generator = Generator.from_pretrained(trained.model, 'torch')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            generator('a maroon thing', negative_prompt='rufles', num_inference_steps=1)
    found = [w for w in caught if w.category is UnknownWordsWarning]
    assert [str(w.message) for w in found] == ['maroon: not learned', 'rufles: not learned; near: ruffles']
    assert found[0].filename == __file__, 'the warning points at the call'


def test_command_names_unknown_words(trained, tmp_path, capsys):
    from flowerdiff.pipeline.cli import main

    command = [
        'generate',
        'a crimsn thing',
        '--model',
        str(trained.model),
        '--steps',
        '1',
        '--backend',
        'torch',
    ]
    assert main([*command, '-o', str(tmp_path / 'a.png')]) == 0
    printed = capsys.readouterr()
    assert 'crimsn: not learned; near: crimson' in printed.err
    assert 'Warning' not in printed.err and printed.out.strip() == str(tmp_path / 'a.png')


def test_studio_shows_unknown_words_under_the_prompt(trained):
    from flowerdiff.apps.request import GenerationRequest
    from flowerdiff.apps.session import GenerationSession
    from flowerdiff.apps.widgets import GeneratedPicture, figure_html

    session = GenerationSession(trained.root)
    request = GenerationRequest('a maroon thing', num_inference_steps=1, backend='torch')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        [picture] = session.generate(request)
        [again] = session.generate(request)
    assert picture.info['note'] == again.info['note'] == 'maroon: not learned'
    assert 'maroon: not learned' in figure_html(GeneratedPicture(request, picture))
    [known] = session.generate(GenerationRequest('a crimson thing', num_inference_steps=1, backend='torch'))
    assert not known.info.get('note')


def test_a_model_without_a_list_of_words_is_silent(trained, tmp_path):
    from flowerdiff.core.checksums import write_checksums
    from flowerdiff.inference.generator import Generator

    shutil.copytree(trained.model, tmp_path / 'model')
    (tmp_path / 'model' / 'vocabulary.json').unlink()
    write_checksums(tmp_path / 'model')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        Generator.from_pretrained(tmp_path / 'model', 'torch')('a maroon thing', num_inference_steps=1)


def test_words_travel_with_the_exports(trained, tmp_path):
    from flowerdiff.inference.onnx_export import copy_configs
    from flowerdiff.stages.publish import assemble

    (tmp_path / 'onnx').mkdir()
    for part in ('text_encoder', 'unet', 'vae_decoder', 'vae_encoder'):
        (tmp_path / 'onnx' / part).mkdir()
    copy_configs(trained.model, tmp_path / 'onnx')
    (tmp_path / 'published').mkdir()
    assemble(trained, tmp_path / 'published', 'cards', 'someone/cards')
    words = (trained.model / 'vocabulary.json').read_bytes()
    for name in ('onnx', 'published'):
        assert (tmp_path / name / 'vocabulary.json').read_bytes() == words


def test_auto_without_network_trains_quickly_decided(tmp_path, monkeypatch):
    "Offline the choice takes no time, and it is kept when the cache gains the model."
    from flowerdiff.models import text_encoder as library

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(library, 'locate_part', lambda *_: None)
    library.is_on_the_hub.cache_clear()
    chosen = library.choose_text_encoder('auto', tmp_path)
    assert chosen.spec == 'train' and 'not reachable' in chosen.line()
    (tmp_path / 'manifest.json').write_text(json.dumps(dict(text_encoder=dict(setting='auto', spec='train'))))
    monkeypatch.setattr(library, 'is_cached', lambda: True)
    assert library.choose_text_encoder('auto', tmp_path).spec == 'train'
    assert library.choose_text_encoder('auto', tmp_path / 'new').spec == library.HUB_CLIP
    library.is_on_the_hub.cache_clear()
