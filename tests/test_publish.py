"""A published folder is a model that Diffusers opens. It is published once, and never replaces another
user's folder."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.workspace import open_workspace, write_jsonl
from flowerdiff.stages.publish import run

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_model


def estimate(v, n=200):
    return dict(value=v, low=v - 0.02, high=v + 0.01, n=n)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    ws = open_workspace(tmp_path_factory.mktemp('publish') / 'meadow', 'garden', {'evaluate.steps': 2})
    tiny_model(ws.model)
    write_json(ws.model / 'record.json', dict(run_id='secret-run', validation=[0.1] * 9))
    write_json(ws.model / 'train_settings.json', {})
    ws.report.mkdir()
    Image.new('RGB', (64, 64), 'pink').save(ws.report / 'grid.png')
    write_json(
        ws.report / 'metrics.json',
        dict(
            adherence=dict(color=estimate(0.985), species=estimate(0.96)),
            kid=dict(drawn=estimate(0.03), autoencoder=estimate(0.01)),
            seed=0,
            skipped={},
        ),
    )
    write_jsonl(
        ws.captions / 'metadata.jsonl',
        [dict(file_name=f'test/{i}.png', captions=[f'a rose {i} "quoted"']) for i in range(4)],
    )
    write_json(ws.pictures / 'info.json', dict(counts=dict(train=40), kind='garden'))
    return ws


@pytest.fixture
def ws(made, tmp_path):
    shutil.copytree(made.root, tmp_path / 'meadow')
    return open_workspace(tmp_path / 'meadow')


def stamps(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob('*')}


def test_diffusers_opens_it_and_draws_the_same(ws):
    result = run(ws.root)
    folder = Path(result.published['url'])
    import torch
    from diffusers import DiffusionPipeline

    def draw(where):
        pipe = DiffusionPipeline.from_pretrained(where, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return np.array(
            pipe(
                'a red rose',
                num_inference_steps=2,
                height=32,
                width=32,
                generator=torch.Generator().manual_seed(0),
            ).images[0]
        )

    assert np.array_equal(draw(folder), draw(ws.model))
    names = {f['path'] for f in result.published['files']}
    assert {'README.md', 'model_index.json', 'samples/grid.png', 'samples/0.png', 'unet/config.json'} <= names
    assert not [
        n for n in names if 'record' in n or 'train_settings' in n or n.endswith(('.bin', '.pt', '.pkl'))
    ]
    assert read_json(ws.root / 'published.json')['revision'] == result.published['revision']


def test_a_student_travels_as_one(ws):
    """Breaks when the published model does not say its steps, says more of its training, or the card and
    its samples have the teacher's."""
    from flowerdiff.inference.generator import Generator
    from flowerdiff.stages.publish import sample_prompts

    write_json(
        ws.model / 'train_settings.json',
        dict(run_id='secret-run', train=dict(distill=1, stream_from='s3://secret')),
    )
    done = run(ws.root)
    folder = Path(done.published['url'])
    draw = Generator.from_pretrained(folder, 'torch')
    assert (draw.backend.steps, draw.backend.guidance) == (1, 1.0) and read_json(
        folder / 'train_settings.json'
    ) == dict(train=dict(distill=1))
    assert re.search(r'num_inference_steps=1,\s+guidance_scale=1.0,', done.card)
    assert all(
        np.array_equal(a, Image.open(folder / f'samples/{i}.png'))
        for i, a in enumerate(draw(sample_prompts(ws)))
    )


def test_nothing_changed_nothing_written(ws):
    first = run(ws.root)
    before = stamps(ws.root / 'published')
    again = run(ws.root)
    assert (
        again.published['revision'] == first.published['revision']
        and not again.published['changed']
        and 'unchanged' in again.summary
    )
    assert stamps(ws.root / 'published') == before
    (ws.root / 'published.json').unlink()  # DVC removes outputs before a stage
    assert not run(ws.root).published['changed']


def test_another_model_is_another_revision(ws):
    first = run(ws.root).published
    config = read_json(ws.model / 'unet/config.json')
    write_json(ws.model / 'unet/config.json', dict(config, note='retrained'))
    second = run(ws.root).published
    assert second['changed'] and second['revision'] != first['revision']
    assert 'retrained' in (Path(second['url']) / 'unet/config.json').read_text()


def test_a_foreign_folder_is_left_alone(ws):
    other = ws.root / 'published/meadow'
    other.mkdir(parents=True)
    (other / 'precious.txt').write_text('mine')
    with pytest.raises(UserError, match='did not publish'):
        run(ws.root)
    assert [p.name for p in other.iterdir()] == ['precious.txt']


def test_a_failure_leaves_the_published_one(ws, monkeypatch):
    run(ws.root)
    before = stamps(ws.root / 'published')
    shutil.rmtree(ws.model / 'vae')
    with pytest.raises(Exception):  # noqa: B017 (any error)
        run(ws.root)
    assert stamps(ws.root / 'published') == before and not list(ws.work.glob('publish-*'))
    shutil.rmtree(ws.model)
    with pytest.raises(UserError, match='no model yet'):
        run(ws.root)


def test_the_card(ws):
    from huggingface_hub import ModelCard

    card = ModelCard.load(Path(run(ws.root).published['url']) / 'README.md')
    d = card.data
    assert (d.pipeline_tag, d.library_name, d.license, d.language) == (
        'text-to-image',
        'diffusers',
        'apache-2.0',
        'en',
    )
    found = {r.metric_name: r.metric_value for r in d.eval_results}
    assert (
        found['adherence color'] == 0.985
        and found['adherence species'] == 0.96
        and 'kid autoencoder' not in found
    )
    folder = ws.root / 'published/meadow'
    assert (
        d.widget
        and all((folder / w['output']['url']).is_file() for w in d.widget)
        and d.widget[0]['text'] == 'a rose 0 "quoted"'
    )
    assert '98.5 %' in card.text and '40 images' in card.text and str(ws.root.parent) not in str(card)
    code = card.text.split('```python')[1].split('```')[0]
    compile(code, 'card', 'exec')
    for picture in ('samples/grid.png',):
        assert picture in card.text and (folder / picture).is_file()


def test_without_a_token_the_hub_is_skipped(ws, monkeypatch):
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setenv('HF_HOME', str(ws.root / 'nobody'))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    result = run(ws.root, overrides={'publish.destination': 'hub', 'publish.repo_name': 'someone/meadow'})
    assert 'HF_TOKEN' in result.skipped and read_json(ws.work / 'records/publish.json')['status'] == 'skipped'
    with pytest.raises(UserError, match='owner/name'):
        run(ws.root, overrides={'publish.repo_name': 'meadow'})


def test_engines_go_along_by_choice(ws):
    """Breaks when engines of other weights or a driver's cache are copied, when the setting is not read,
    or where `find_engines` does not look."""
    from flowerdiff.drawing.model_files import weights_fingerprint
    from flowerdiff.inference.tensorrt import find_engines

    model = weights_fingerprint(ws.model)
    write_json(ws.onnx / 'parity.json', dict(passed=True, model=model))
    kind = dict(gpu='', targets=['SM86'], package='tensorrt_rtx', version='1.7.1', precision='fp16', parts={})
    write_json(
        ws.tensorrt / 'status.json',
        dict(gpu='mine', sets=dict(new=dict(kind, model=model), old=dict(kind, model='others'))),
    )
    for f in ('new/unet.engine', 'new/unet.kernels', 'old/unet.engine'):
        (ws.tensorrt / f).parent.mkdir(exist_ok=True)
        (ws.tensorrt / f).write_bytes(b'engine')

    def tensorrt(done):
        return {f['path'] for f in done.published['files'] if f['path'].startswith('tensorrt/')}

    assert tensorrt(run(ws.root)) == set()
    done = run(ws.root, overrides={'publish.engines': True})
    folder = Path(done.published['url'])
    assert tensorrt(done) == {'tensorrt/status.json', 'tensorrt/new/unet.engine'} and list(
        read_json(folder / 'tensorrt/status.json')['sets']
    ) == ['new']
    assert (
        'SM86 (tensorrt_rtx 1.7.1, fp16)' in done.card
        and 'new: the engines ' in find_engines(folder / 'onnx').reason
    )


def test_a_name_that_leads_out_of_the_folder(ws):
    "Breaks when `repo_name` takes any text for a folder's name."
    for name in ('..', '../elsewhere', '/tmp/meadow'):
        with pytest.raises(UserError, match=r'publish\.repo_name'):
            run(ws.root, overrides={'publish.repo_name': name})
