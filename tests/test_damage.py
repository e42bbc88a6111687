"""Damage to what a stage relies on is noticed before the stage uses it.

Every file is flipped, cut, emptied and removed once, for each stage, command or page that opens it.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from flowerdiff.core.checksums import recorded_files, verify_folder, write_checksums
from flowerdiff.core.errors import UserError
from flowerdiff.core.files import write_json
from flowerdiff.core.workspace import open_workspace


def flip(file):
    "Change one bit, and keep the dates."
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b'')


HARMS = (flip, cut, empty, os.unlink)


def make_encoded(encoded):
    from flowerdiff.data.shards import ShardWriter

    latents = np.zeros((4, 2, 4, 8, 8), 'float16')
    for split in ('train', 'val'):
        fields = dict(mean=(latents.shape[1:], 'float16'), std=(latents.shape[1:], 'float16'))
        with ShardWriter(encoded / split, 'latents', fields, shard_records=3) as writer:
            writer.append(mean=latents, std=latents)
        write_json(encoded / split / 'captions.json', [[0]] * 4)
        write_json(encoded / split / 'files.json', [f'{i}.png' for i in range(4)])
    with ShardWriter(encoded / 'text', 'text', dict(embedding=((16, 32), 'float16'))) as writer:
        writer.append(embedding=np.zeros((2, 16, 32), 'float16'))
    write_json(encoded / 'manifest.json', dict(fingerprint='tiny', checksums=True))
    write_checksums(encoded)


@pytest.fixture(scope='module')
def ws(tmp_path_factory):
    "A workspace with every folder that a stage hands on."
    ws = open_workspace(tmp_path_factory.mktemp('damage') / 'ws', 'garden', {'tracking.enabled': False})
    tiny_model(ws.candidate)
    write_json(ws.candidate / 'train_settings.json', dict(train={}, run_id='tiny', checksums=True))
    write_checksums(ws.candidate)
    for folder in (ws.model, ws.student, ws.work / 'previous'):
        shutil.copytree(ws.candidate, folder)
    for part in ('unet', 'vae_decoder'):
        (ws.onnx / part).mkdir(parents=True)
        (ws.onnx / part / 'model.onnx').write_bytes(b'the graph of ' + part.encode())
    shutil.copyfile(ws.model / 'model_index.json', ws.onnx / 'model_index.json')
    write_json(ws.onnx / 'parity.json', dict(model='tiny', checksums=True))
    write_checksums(ws.onnx)
    write_json(ws.root / 'train.json', dict(run_id='tiny'))
    make_encoded(ws.encoded)
    published = ws.root / 'published' / 'ws'
    shutil.copytree(ws.model, published)
    shutil.copytree(ws.onnx, published / 'onnx')
    write_checksums(published)
    record = dict(revision='1', kind='folder', repository='ws', private=False)
    write_json(ws.root / 'published.json', record)
    return ws


def promote(ws):
    from flowerdiff.stages.promote import run

    run.plain(ws)


def evaluate(ws):
    from flowerdiff.stages.evaluate import run

    run.plain(ws)


def onnx(ws):
    from flowerdiff.stages.onnx import run

    run.plain(ws)


def tensorrt(ws):
    from flowerdiff.stages.tensorrt import run

    run.plain(ws)


def publish(ws):
    from flowerdiff.stages.publish import assemble

    assemble(ws, ws.work / 'made', 'ws', 'someone/ws')


def generate(where):
    def load(ws):
        from flowerdiff.inference.generator import Generator

        Generator.from_pretrained(ws.root / where, 'torch')

    return load


def open_export(ws):
    from flowerdiff.inference.backends import open_backend

    open_backend('onnx', ws.onnx)


def space(ws):
    from flowerdiff.apps.hf_space import source

    source(ws.root)


def roll_back(ws):
    from flowerdiff.stages.promote import roll_back

    roll_back(ws.root)


def train(ws):
    from flowerdiff.data.batches import load_split
    from flowerdiff.training.worker import load_training

    load_training(ws)
    load_split(ws.encoded, 'val')


def train_stage(ws):
    from flowerdiff.stages.train import run

    run.plain(ws)


def distill(ws):
    from flowerdiff.data.batches import load_split
    from flowerdiff.training.distillation import distillation_setup

    distillation_setup(ws, load_split(ws.encoded, 'train'), 'cpu')


def fine_tune(ws):
    from flowerdiff.models.finetune import load_base_unet

    load_base_unet(ws.model, 4, 32)


RELIES_ON = [
    (promote, 'candidate'),
    (promote, 'model'),
    (promote, 'encoded'),
    (evaluate, 'model'),
    (evaluate, 'encoded'),
    (onnx, 'model'),
    (publish, 'model'),
    (tensorrt, 'onnx'),
    (open_export, 'onnx'),
    (generate('model'), 'model'),
    (generate('student'), 'student'),
    (generate('published/ws'), 'published/ws'),
    (space, 'published/ws'),
    (roll_back, 'work/previous'),
    (train_stage, 'encoded'),
    (distill, 'model'),
    (fine_tune, 'model'),
]


def notice(use, ws, file, harm):
    "Harm a file, use its folder, and return the message."
    whole = file.read_bytes()
    harm(file)
    try:
        use(ws)
    except UserError as error:
        return str(error)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(('use', 'name'), RELIES_ON, ids=lambda x: getattr(x, '__name__', x))
def test_every_damaged_file_is_noticed_before_use(ws, use, name):
    "Breaks when a user of a folder does not compare all of its files first, or trusts their dates."
    folder = ws.root / name
    files = [*recorded_files(folder), folder / 'checksums.json']
    if name == 'published/ws':
        files = files[:-1]  # without its record it is a model of unknown origin
    assert len(files) >= 3
    for file in files:
        for harm in HARMS:
            message = notice(use, ws, file, harm) or ''
            missing = harm is os.unlink and message.startswith(str(folder))
            assert missing or message.startswith(str(file)), (file, harm, message)
            assert '\n' not in message and '; ' in message  # the way back


def test_every_damaged_shard_is_noticed_before_training(ws):
    "Breaks when the records are loaded without their checksums, or a file beside them is not compared."
    train(ws)
    files = [path for path in ws.encoded.rglob('*') if path.is_file()]
    assert sum(path.suffix == '.bin' for path in files) == 5
    for file in files:
        for harm in HARMS:
            assert str(file) in (notice(train, ws, file, harm) or ''), (file, harm)


def test_a_damaged_folder_names_the_way_back(ws):
    "Breaks when the message sends you to something that does not help."
    weights = ws.model / 'unet' / 'diffusion_pytorch_model.safetensors'

    def look(ws):
        verify_folder(ws.model, again=True)

    assert 'takes the same model from candidate/' in notice(look, ws, weights, flip)
    settings = ws.candidate / 'train_settings.json'
    whole = settings.read_bytes()
    write_json(settings, dict(train={}, run_id='another', checksums=True))
    assert f'flowerdiff rollback {ws.root}' in notice(look, ws, weights, flip)
    (ws.work / 'previous').rename(ws.work / 'away')
    assert '--from train --force' in notice(look, ws, weights, flip)
    (ws.work / 'away').rename(ws.work / 'previous')
    settings.write_bytes(whole)


def test_a_folder_of_another_program_is_accepted(tmp_path):
    "Breaks when a model without checksums is refused."
    verify_folder(tiny_model(tmp_path))
    verify_folder(tmp_path / 'missing')


def test_a_champion_of_an_older_version_is_compared_with_its_fingerprint(ws, tmp_path):
    "Breaks when a model without checksums is certified although its record says other weights."
    from flowerdiff.models.components import component_fingerprint

    old = open_workspace(tmp_path / 'old', 'garden', {'tracking.enabled': False})
    tiny_model(old.candidate)
    shutil.copytree(old.candidate, old.model)
    write_json(old.root / 'train.json', dict(run_id='old', validation=dict(by_picture=[1.0], loss=1.0)))
    write_json(old.model / 'record.json', dict(fingerprint=component_fingerprint(old.model / 'unet')))
    promote(old)
    weights = old.model / 'unet' / 'diffusion_pytorch_model.safetensors'
    assert 'fingerprint differs' in notice(promote, old, weights, flip)


def test_the_studio_names_the_damaged_file(ws):
    "Breaks when the studio draws with a damaged model."
    from flowerdiff.apps.request import GenerationRequest
    from flowerdiff.apps.session import GenerationSession

    def draw(ws):
        session = GenerationSession(ws.root)
        session.generate(GenerationRequest('a red rose', backend='torch'))

    for name in ('unet/diffusion_pytorch_model.safetensors', 'tokenizer/vocab.json'):
        for harm in HARMS:
            assert name in notice(draw, ws, ws.model / name, harm)


@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder'])
def test_weights_that_are_not_numbers_draw_nothing(tmp_path, part):
    "Breaks when NaN or infinite weights are loaded, by any door."
    from safetensors.torch import load_file, save_file

    model = tiny_model(tmp_path / 'model')
    [file] = (model / part).glob('*.safetensors')
    for value in (float('nan'), float('inf')):
        weights = load_file(file)
        name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
        weights[name].view(-1)[0] = value
        save_file(weights, file, metadata=dict(format='pt'))
        with pytest.raises(UserError, match='not numbers') as error:
            generate('model')(open_workspace_like(tmp_path))
        assert '\n' not in str(error.value)


def open_workspace_like(root):
    from flowerdiff.core.workspace import Workspace

    return Workspace(root, None)


def test_a_backend_that_computes_no_numbers_draws_nothing(tmp_path):
    "Breaks when a picture is made of NaN: it is black."
    from flowerdiff.inference.generator import Generator
    from flowerdiff.inference.torch_backend import TorchBackend

    class Broken(TorchBackend):
        def denoise(self, latents, t, text):
            return super().denoise(latents, t, text) * float('nan')

    generator = Generator(Broken(tiny_model(tmp_path / 'model')))
    with pytest.raises(UserError, match='values that are not numbers'):
        generator('a red rose', num_inference_steps=2)


def test_a_damaged_champion_is_rolled_back_and_not_kept(ws, tmp_path):
    "Breaks when the damaged model becomes the one to go back to, or is banned."
    root = tmp_path / 'ws'
    shutil.copytree(ws.root, root)
    copy = open_workspace(root)
    write_json(copy.work / 'previous' / 'record.json', dict(run_id='before'))
    write_checksums(copy.work / 'previous')
    flip(copy.model / 'unet' / 'diffusion_pytorch_model.safetensors')
    from flowerdiff.stages.promote import roll_back

    assert roll_back(root)['run_id'] == 'before'
    verify_folder(copy.model, again=True)
    verify_folder(copy.work / 'previous', again=True)
    assert not (copy.work / 'rolled_back.json').exists() and not (copy.work / 'rolling-back').exists()


def test_a_store_with_a_damaged_list_is_refused(tmp_path):
    "Breaks when a manifest with another path or size is believed."
    from flowerdiff.services.store import LocalStore, push, read_manifest

    folder = tmp_path / 'data'
    folder.mkdir()
    for name in 'ab':
        Path(folder / name).write_text(name, encoding='utf-8')
    store = LocalStore(tmp_path / 'store')
    push(folder, store)
    read_manifest(store)
    file = tmp_path / 'store' / 'manifest.json'
    text = file.read_text()
    for old, new in (('"path": "a"', '"path": "c"'), ('"size": 1', '"size": 2')):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match='is damaged'):
            read_manifest(store)
