"Other programs read what a workspace holds: Diffusers, single-file readers, ONNX Runtime, Datasets, MLflow."

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerdiff.core.files import write_json
from flowerdiff.core.workspace import demo_workspace, open_workspace, read_jsonl, write_jsonl

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SD1, tiny_model, tiny_sd1


def publish(folder, model):
    from flowerdiff.stages.publish import run

    ws = open_workspace(folder, 'garden', {'evaluate.steps': 2})
    shutil.copytree(model, ws.model)
    write_jsonl(ws.captions / 'metadata.jsonl', [dict(file_name='test/0.png', captions=['a red rose'])])
    write_json(ws.pictures / 'info.json', dict(counts=dict(train=40), kind='garden'))
    return Path(run(ws.root).published['url'])


@pytest.fixture(scope='module')
def sd1(tmp_path_factory):
    "A published model with Stable Diffusion 1's blocks and a LoRA."
    from flowerdiff.models import single_file

    tmp = tmp_path_factory.mktemp('sd1')
    model = tiny_sd1(tmp / 'model', rank=4, alpha=8.0)
    sizes = copy.deepcopy(single_file.SD1)
    for part, values in SD1.items():
        sizes[part] |= values
    del sizes['text_encoder']['vocab_size']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, 'SD1', sizes)
        folder = publish(tmp / 'meadow', model)
    return folder


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def test_a_single_file_has_every_weight(sd1):
    """Breaks when a key is translated wrongly, a weight is lost or changed, or the file is not published."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    weights = load_file(sd1 / 'meadow.safetensors')
    roots = ('model.diffusion_model.', 'first_stage_model.', 'cond_stage_model.transformer.text_model.')
    counts = [sum(name.startswith(root) for name in weights) for root in roots]
    assert counts == [686, 248, 4 + 16 * 2] and sum(counts) == len(weights)
    for name, shape in {
        'model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight': [16, 32],
        'model.diffusion_model.output_blocks.2.1.conv.weight': [64, 64, 3, 3],
        'model.diffusion_model.output_blocks.11.1.proj_in.weight': [16, 16, 1, 1],
        'first_stage_model.decoder.up.3.upsample.conv.weight': [16, 16, 3, 3],
        'first_stage_model.encoder.mid.attn_1.q.weight': [16, 16, 1, 1],
    }.items():
        assert list(weights[name].shape) == shape, name
    read = StableDiffusionPipeline.from_single_file(sd1 / 'meadow.safetensors', config=str(sd1))
    written = StableDiffusionPipeline.from_pretrained(sd1)
    for part in ('unet', 'vae', 'text_encoder'):
        assert equal_weights(getattr(read, part), getattr(written, part)), part


def test_a_kohya_lora_has_its_strength(sd1, tmp_path):
    """Breaks when alpha is not written, or up and down are exchanged: base and LoRA are the merged model."""
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    weights = load_file(sd1 / 'meadow-lora.safetensors')
    name = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0'
    assert {len(weights) / 3, float(weights[f'{name}.alpha'])} == {
        128,
        4,
    }  # the strength is in the weights, so alpha is the rank
    assert weights[f'{name}.lora_down.weight'].shape == (4, 64)
    assert weights[f'{name}.lora_up.weight'].shape == (64, 4)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1(tmp_path / 'base'))
    merged = StableDiffusionPipeline.from_pretrained(sd1).unet
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        pipe.load_lora_weights(sd1, weight_name='meadow-lora.safetensors')
        after = pipe.unet(*inputs).sample
        expected = merged(*inputs).sample
    assert (after - expected).abs().max() < 1e-4 < (before - expected).abs().max()


def test_other_layouts_get_no_single_file(tmp_path):
    """Breaks when a file is written that no reader opens."""
    folder = publish(tmp_path / 'meadow', tiny_model(tmp_path / 'model'))
    assert not list(folder.glob('*.safetensors'))
    assert 'ComfyUI' not in (folder / 'README.md').read_text()


OPEN = """
import sys, warnings
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

warnings.simplefilter('error', FutureWarning)
logging.disable_progress_bar()
transformers_logging.disable_progress_bar()
print('imported', file=sys.stderr, flush=True)
for folder in sys.argv[1:]:
    StableDiffusionPipeline.from_pretrained(folder)
"""


def test_diffusers_opens_models_without_a_warning(sd1):
    """Breaks when a saved configuration makes Diffusers or transformers warn. Diffusers itself names
    AutoencoderKL alone for its pipeline, so it says one line about the garden's AutoencoderTiny."""
    garden = demo_workspace('promote').model
    done = subprocess.run([sys.executable, '-c', OPEN, garden, sd1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr.split('imported\n')[1].splitlines()
    assert len(said) == 1 and said[0].startswith('Expected types for vae: ') and 'AutoencoderTiny' in said[0]


def photos(folder):
    "Write pictures of two classes. A few of them are small, and a few have a caption."
    rng = np.random.default_rng(0)
    for i in range(24):
        side = 24 if i % 12 == 5 else 48
        file = folder / ('rose', 'iris')[i % 2] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(file)
        if i % 4 == 0:
            file.with_suffix('.txt').write_text(f'picture number {i}')
    return folder


def load_pictures(pictures, cache):
    datasets = pytest.importorskip('datasets')
    return datasets.load_dataset('imagefolder', data_dir=str(pictures), cache_dir=str(cache))


def test_datasets_reads_a_text_column(tmp_path):
    """Breaks when the pictures have no `text`, when it is not the first caption, or when a column that only
    some pictures need is missing in one split."""
    from flowerdiff.stages import prepare

    ws = demo_workspace('caption')
    captions = {row['file_name']: row['captions'][0] for row in read_jsonl(ws.captions / 'metadata.jsonl')}
    garden = load_pictures(ws.pictures, tmp_path / 'cache')
    folders = dict(train='train', validation='val', test='test')
    for split, folder in folders.items():
        rows = read_jsonl(ws.pictures / folder / 'metadata.jsonl')
        expected = [captions[f'{folder}/{row["file_name"]}'] for row in rows]
        assert garden[split]['text'] == expected
    source = str(photos(tmp_path / 'photos'))
    settings = {'prepare.source': source, 'prepare.resolution': 32}
    prepared = prepare.run(tmp_path / 'own', 'folder', settings)
    own = load_pictures(prepared.folder, tmp_path / 'cache')
    texts = [text for split in own.values() for text in split['text']]
    assert len(texts) == 24 and set(texts) > {'a rose', 'an iris', 'picture number 4'}
    assert sum(bool(note) for split in own.values() for note in split['note']) == 2


def test_mlflow_gives_the_champion_s_files(tmp_path, monkeypatch):
    """Breaks when `models:/NAME@champion` gives no model, another one after the next promotion or after the
    workspace was moved, or takes its space twice."""
    import mlflow

    from flowerdiff.services.mlflow_paths import adopt_database
    from flowerdiff.services.registry import name_champion
    from flowerdiff.services.tracking import experiment_id, mlflow_client

    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    ws = open_workspace(tmp_path / 'meadow', 'garden')
    tiny_model(ws.model)
    client = mlflow_client(ws.root)
    for run_id in ('ab12', 'cd34'):
        run = client.create_run(experiment_id(client, ws)).info.run_id
        write_json(ws.work / f'train-{run_id}' / 'tracked.json', dict(mlflow=dict(mlflow_run=run)))
    weights = 'unet/diffusion_pytorch_model.safetensors'

    def download(root, version='@champion'):
        monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{root}/mlflow.db')
        try:
            return Path(mlflow.artifacts.download_artifacts(f'models:/meadow{version}'))
        finally:
            monkeypatch.delenv('MLFLOW_TRACKING_URI')

    assert 'version 1' in name_champion(ws, dict(run_id='ab12', validation=0.3))
    assert os.path.samefile(download(ws.root) / weights, ws.model / weights)
    shutil.rmtree(ws.model)
    tiny_model(ws.model, size=48)
    assert 'version 2' in name_champion(ws, dict(run_id='cd34', validation=0.2))
    assert os.path.samefile(download(ws.root) / weights, ws.model / weights)
    assert not (download(ws.root, '/1') / weights).exists()
    moved = tmp_path / 'moved'
    ws.root.rename(moved)
    adopt_database(moved)
    folder = download(moved)
    assert folder.is_relative_to(moved) and os.path.samefile(folder / weights, moved / 'model' / weights)
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size == 24
