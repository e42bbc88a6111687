"Pictures that keep their shape, from a folder to a report."

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import flowerdiff.stages.caption as caption
import flowerdiff.stages.encode as encode
import flowerdiff.stages.evaluate as evaluate
import flowerdiff.stages.prepare as prepare
import flowerdiff.stages.promote as promote
import flowerdiff.stages.train as train
from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json
from flowerdiff.core.profiles import load_profile
from flowerdiff.core.workspace import open_workspace, read_jsonl
from flowerdiff.data.batches import BucketedSplit, load_split, make_batch
from flowerdiff.data.encoding import encode_batch
from flowerdiff.data.images import buckets
from flowerdiff.garden.garden import draw, sample_attributes
from flowerdiff.models.components import load_autoencoder

TINY = {
    'prepare.crop': 'buckets',
    'prepare.val': 0.1,
    'prepare.test': 0.1,
    'components.autoencoder': 'garden',
    'components.text_encoder': 'garden',
    'encode.batch_size': 4,
    'encode.shard_records': 4,
    'train.epochs': 2,
    'train.batch_size': 4,
    'train.channels': [16, 16, 32],
    'train.warmup_steps': 2,
    'train.samples_every': 8,
    'train.validate_every': 8,
    'train.threads': 1,
    'evaluate.prompts': 4,
    'evaluate.steps': 2,
    'evaluate.kid_pictures': 5,
    'evaluate.grid': 2,
    'tracking.enabled': False,
}
SHAPES = (120, 80), (80, 120), (100, 100), (130, 100)


@pytest.fixture(scope='module')
def ws(tmp_path_factory):
    "Flowers beside a red post at the left rim, in four shapes, up to their latents."
    d = tmp_path_factory.mktemp('buckets')
    (d / 'mine').mkdir()
    for i in range(60):
        w, h = SHAPES[i % 4]
        im = Image.new('RGB', (w, h), 'white')
        im.paste(draw(sample_attributes(3, i), 3, i, min(w, h)), (w - min(w, h), h - min(w, h)))
        im.paste('red', (0, 0, w // 10, h))
        im.save(d / 'mine' / f'{i:02}.png')
    with open(d / 'mine' / 'metadata.jsonl', 'w', encoding='utf-8') as f:
        for i in range(60):
            print(json.dumps(dict(file_name=f'{i:02}.png', caption=f'flower number {i}')), file=f)
    for s in (prepare, caption, encode):
        s.run(str(d / 'ws'), 'folder', TINY | {'prepare.source': str(d / 'mine')})
    return open_workspace(d / 'ws')


def test_training_pictures_keep_their_shape_and_the_others_are_squares(ws):
    shapes = set()
    for r in read_jsonl(ws.pictures / 'train' / 'metadata.jsonl'):
        im = Image.open(ws.pictures / 'train' / r['file_name']).convert('RGB')
        shapes.add(im.size)
        assert im.size == tuple(r.get('bucket', (64, 64))) and im.size in buckets(64)
        assert (
            ('bucket' in r) == (r['width'] != r['height'])
            and (im.width > im.height) == (r['width'] > r['height'])
            and (im.width < im.height) == (r['width'] < r['height'])
        )
        assert np.asarray(im)[im.height // 2, 1, 0] > 180 > 100 > np.asarray(im)[im.height // 2, 1, 2], (
            'the post at the rim was cut off'
        )
    assert len(shapes) == 4
    for s in ('val', 'test'):
        rows = read_jsonl(ws.pictures / s / 'metadata.jsonl')
        assert 2 < len(rows) < 13 and not any('bucket' in r for r in rows)
        assert {Image.open(ws.pictures / s / r['file_name']).size for r in rows} == {(64, 64)}


def test_each_number_is_its_picture_with_its_caption(ws):
    split, files = load_split(ws.encoded, 'train'), read_json(ws.encoded / 'train' / 'files.json', kind=list)
    assert (
        isinstance(split, BucketedSplit)
        and len(split) == len(files) == len(read_jsonl(ws.pictures / 'train' / 'metadata.jsonl'))
        and split.sizes[0]
        and len(split.sizes) == 4
    )
    vae, texts = load_autoencoder('garden'), read_json(ws.encoded / 'text' / 'texts.json', kind=list)
    rows = {r['file_name']: r for r in read_jsonl(ws.pictures / 'train' / 'metadata.jsonl')}
    for i in (0, split.sizes[0] - 1, *split.starts[1:4], len(files) - 1):
        picture = np.asarray(Image.open(ws.pictures / 'train' / files[i]).convert('RGB'))[None]
        fresh = encode_batch(vae, files[i : i + 1], picture)['mean'][0].astype(np.float32)
        for side in (0, 1):
            kept = split.latents(np.array([i]), np.array([side]))[0][0].numpy()
            assert (
                kept.shape == (4, picture.shape[1] // 4, picture.shape[2] // 4)
                and np.abs(kept - fresh[side]).mean() < 0.05 < np.abs(kept - fresh[1 - side]).mean()
            )
        assert texts[split.captions[i][0]] == f'flower number {int(rows[files[i]]["source"][:2])}'
    assert read_json(ws.encoded / 'manifest.json')['records']['train'] == len(files)


def test_encode_that_was_stopped_goes_on_and_ends_the_same(ws, tmp_path, monkeypatch):
    again = open_workspace(shutil.copytree(ws.root, tmp_path / 'again'))
    shutil.rmtree(again.encoded)
    whole, calls = encode.run.plain, []
    import flowerdiff.data.encoding as E

    real = E.encode_batch

    def dies(vae, names, pictures):
        calls.append(len(names))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(vae, names, pictures)

    monkeypatch.setattr(E, 'encode_batch', dies)
    with pytest.raises(KeyboardInterrupt):
        whole(again)
    first = sum(calls[:-1])
    whole(again)
    assert sum(calls[9:]) <= 60 - first + 4 * 4, 'more than a shard a set was done again'
    for f in (ws.encoded / 'train').iterdir():
        assert f.read_bytes() == (again.encoded / 'train' / f.name).read_bytes(), f.name
    assert 'as encoded before' in whole(again).summary
    min((again.encoded / 'train').glob('latents*x*.json')).unlink()
    assert 'as encoded before' not in whole(again).summary


def test_trains_and_is_measured(ws):
    encode.run(str(ws.root)).show()  # a row of pictures beside their latents, of whatever shape
    train.run(str(ws.root))
    facts = read_json(ws.root / 'train.json')
    steps = 2 * (facts['samples'] // (2 * 4))
    assert facts['steps'] == steps > 20 and np.isfinite(facts['validation_curve'][-1][1])
    promote.run(str(ws.root))
    said = evaluate.run(str(ws.root))
    assert (ws.report / 'index.html').exists() and 'KID' in said.summary
    split = load_split(ws.encoded, 'train')
    assert len({make_batch(split, s, 0, 4).latents.shape for s in range(steps)}) == 4


def test_a_picture_and_its_square_are_known_for_the_same(tmp_path):
    d = tmp_path / 'mine'
    d.mkdir()
    for i in range(30):
        im = Image.new('RGB', (120, 80), (255 - 6 * i, 6 * i, 90))
        im.paste(draw(sample_attributes(4, i), 4, i, 80), (20, 0))
        im.save(d / f'{i:02}.png')
        if i < 10:
            im.crop((20, 0, 100, 80)).save(d / f'{i:02} square.png')
    rows = {
        s: [
            r['source']
            for r in read_jsonl(
                prepare.run(
                    str(tmp_path / 'ws'),
                    'folder',
                    {
                        'prepare.source': str(d),
                        'prepare.crop': 'buckets',
                        'prepare.val': 0.2,
                        'prepare.test': 0.2,
                    },
                ).folder
                / s
                / 'metadata.jsonl'
            )
        ]
        for s in ('train', 'val', 'test')
    }
    split = {source: s for s, sources in rows.items() for source in sources}
    for i in range(10):
        assert split[f'{i:02}.png'] == split[f'{i:02} square.png'], 'a copy of a training picture is held out'
    assert all(rows.values())


def test_shown_without_a_square_among_them(tmp_path):
    d = tmp_path / 'mine'
    d.mkdir()
    for i in range(12):
        draw(sample_attributes(5, i), 5, i, 120).crop((0, 20, 120, 100)).save(d / f'{i:02}.png')
    for s in (prepare, caption):
        accept = {'caption.accept': ['same_captions']}
        s.run(str(tmp_path / 'ws'), 'folder', TINY | accept | {'prepare.source': str(d)})
    result = encode.run(str(tmp_path / 'ws'))
    assert load_split(result.folder, 'train').sizes[0] == 0
    result.show()


def test_streaming_is_refused_at_once():
    with pytest.raises(UserError, match=r'train\.stream reads latents of one shape'):
        load_profile('folder', {'prepare.crop': 'buckets', 'train.stream': 2})
