"""Readers of what comes from outside: each returns or raises `UserError` with one line, whatever it is given.

FLOWERDIFF_FUZZ=2000 tries so many random inputs per reader; without it, a few that are the same in every run.
"""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import flowerdiff
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from flowerdiff.core.errors import UserError
from flowerdiff.core.workspace import write_jsonl

MANY = int(os.environ.get('FLOWERDIFF_FUZZ', 0))


def tries(few):
    "Decorate a fuzz test: `few` fixed examples, or as many random ones as FLOWERDIFF_FUZZ says."
    return settings(
        max_examples=MANY or few,
        derandomize=not MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def read(reader, *args):
    "Return what a reader returns, None after a `UserError` of one line. Any other error fails the test."
    try:
        return reader(*args)
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 1000, error
        return None


TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(
    ['\ud83d', 'a rose \udf39', '\0', '..', 'NaN', '1e999', '[' * 50, "['\\ud83d']", 'x' * 300]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 10**7, 2**64, 10**30, 1e23])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, data: bytes):
    "Return bytes with a piece cut, doubled, or replaced."
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 200)))
        middle = draw(st.sampled_from([b'', 2 * data[start:end]]) | st.binary(max_size=8))
        data = data[:start] + middle + data[end:]
    return data


@st.composite
def changed(draw, value):
    "Return a JSON value with one of its parts replaced, removed or added."
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(changed(value[i])), *value[i + 1 :]]
    return draw(JSON)


# --- Settings ---------------------------------------------------------------------------------------


def garden_settings():
    "Return the settings of the garden's profile as text and as values."
    from flowerdiff.core.profiles import load_profile, profiles

    return profiles()['garden'].read_bytes(), load_profile('garden').model_dump()


GARDEN_TEXT, GARDEN_VALUES = garden_settings()


@tries(15)
@given(data=damaged(GARDEN_TEXT[:3000]) | changed(GARDEN_VALUES).map(lambda v: json.dumps(v).encode()))
def test_settings(tmp_path_factory, data):
    from flowerdiff.core.profiles import load_settings, write_params

    path = tmp_path_factory.getbasetemp() / 'params.yaml'
    path.write_bytes(data)
    if read(load_settings, path):
        assert read(write_params, 'garden', path)
        assert load_settings(path)


@tries(15)
@given(
    key=st.sampled_from(['train.lr', 'seed', 'prepare.source', 'train.channels', 'caption.accept']), text=TEXT
)
def test_overrides(key, text):
    from flowerdiff.core.profiles import load_profile

    read(load_profile, 'garden', [f'{key}={text}'])


# --- Pictures and what describes them ------------------------------------------------------------------

ROWS = [
    dict(file_name='rose.png', text='a red rose', tags=['red', 'rose'], label=3),
    dict(file_name='lily.png', captions=['a lily', 'white'], score=0.5),
]


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A folder of two pictures, to which each example adds a metadata file."
    from PIL import Image

    folder = tmp_path_factory.mktemp('pictures')
    for name in ('rose.png', 'lily.png'):
        Image.new('RGB', (16, 16), 'red').save(folder / name)
    return folder


def describe(folder: Path, work: Path):
    "Read a folder's metadata as the stages prepare and caption do, and write what was found."
    import numpy as np

    from flowerdiff.core.profiles import load_profile
    from flowerdiff.data.caption_columns import given_captions
    from flowerdiff.data.image_folder import picture_label, row_captions
    from flowerdiff.data.scan import scan_folder
    from flowerdiff.stages.prepare import other_columns

    scan = scan_folder(folder, 10)
    rows = [dict(facts=scan.facts, left_out=[vars(x) for x in scan.left_out])]
    for name in scan.names:
        row = scan.metadata.row(name)
        texts = scan.metadata.texts(name)
        found = given_captions(texts, load_profile('garden').caption, np.random.default_rng(0))
        rows.append(dict(captions=[row_captions(row), found.captions], other=other_columns(row)))
        rows.append(dict(texts=texts, label=picture_label(name, row)))
    write_jsonl(work, rows)
    work.read_text(encoding='utf-8').encode('utf-8')


def table(suffix: str, rows) -> bytes:
    "Write rows as a metadata file."
    if suffix == 'jsonl':
        return '\n'.join(json.dumps(row) for row in rows).encode()
    return json.dumps(rows).encode()


@tries(40)
@given(
    suffix=st.sampled_from(['jsonl', 'json']),
    rows=changed(ROWS).filter(lambda rows: isinstance(rows, list)),
    cut=st.none() | damaged(table('jsonl', ROWS)),
)
def test_metadata(pictures, tmp_path_factory, suffix, rows, cut):
    path = pictures / f'metadata.{suffix}'
    path.write_bytes(table(suffix, rows) if cut is None else cut)
    try:
        read(describe, pictures, tmp_path_factory.getbasetemp() / 'rows.jsonl')
    finally:
        path.unlink()


def test_a_cut_emoji(pictures, tmp_path):
    "Half of a character in a text, a key and a file name."
    rows = [
        {'file_name': 'rose.png', 'text': 'a rose \ud83c', '\ud83d': 1},
        dict(file_name='\ud83d.png', text='a'),
    ]
    path = pictures / 'metadata.jsonl'
    path.write_bytes(table('jsonl', rows))
    (pictures / 'lily.json').write_text('{"tags": ["lily \\ud83c"]}', encoding='utf-8')
    try:
        describe(pictures, tmp_path / 'rows.jsonl')
    finally:
        path.unlink()
        (pictures / 'lily.json').unlink()
    found = (tmp_path / 'rows.jsonl').read_text(encoding='utf-8')
    assert 'a rose \ufffd' in found and 'lily \ufffd' in found


CSV = b'file_name,text,tags\nrose.png,"a red rose, at night","[\'red\', \'rose\']"\nlily.png,a lily,white\n'


@tries(30)
@given(
    name=st.sampled_from(['metadata.csv', 'rose.txt', 'rose.json', 'lily.caption', 'lily.cls']),
    data=damaged(CSV),
)
def test_captions(pictures, tmp_path_factory, name, data):
    path = pictures / name
    path.write_bytes(data)
    try:
        read(describe, pictures, tmp_path_factory.getbasetemp() / 'rows.jsonl')
    finally:
        path.unlink()


def encoded(form: str, **options) -> bytes:
    "Return the bytes of a small picture."
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient('L').resize((24, 24)).convert('RGB').save(file, form, **options)
    return file.getvalue()


def with_text(key: str, text: str, exif: bytes) -> bytes:
    "Return a PNG with a text and an EXIF block."
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for add in (info.add_text, info.add_itxt):
        add(key.encode('latin-1', 'ignore')[:70] or b'prompt', text.encode('utf-8', 'replace').decode())
    return encoded('PNG', pnginfo=info, exif=exif)


PICTURES = [encoded(form) for form in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')]


@tries(60)
@given(
    data=st.sampled_from(PICTURES).flatmap(damaged)
    | st.builds(with_text, TEXT, TEXT, st.binary(max_size=40))
    | st.builds(with_text, TEXT, TEXT, st.binary(max_size=40)).flatmap(damaged)
)
def test_pictures(tmp_path_factory, data):
    from flowerdiff.data.images import CropTask, crop_picture, open_picture, picture_size

    path = tmp_path_factory.getbasetemp() / 'picture.png'
    path.write_bytes(data)
    facts = crop_picture(CropTask(path, path.with_name('cropped'), 16))
    json.dumps(facts).encode()
    read(open_picture, path)
    read(picture_size, path)


# --- Models -------------------------------------------------------------------------------------------

CONFIGS = (
    'unet/config.json',
    'vae/config.json',
    'text_encoder/config.json',
    'scheduler/scheduler_config.json',
    'tokenizer/tokenizer_config.json',
    'model_index.json',
)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A tiny pipeline, and the content of its configuration files."
    folder = tiny_model(tmp_path_factory.mktemp('model') / 'tiny')
    (folder / 'vocabulary.json').write_text('{"words": {"rose": 3}, "pieces": ["rose"]}', encoding='utf-8')
    (folder / 'train_settings.json').write_text('{"train": {"distill": 0}}', encoding='utf-8')
    return folder


def draw(folder: Path):
    "Draw a picture with a model."
    from flowerdiff.inference.generator import Generator

    Generator.from_pretrained(folder, 'torch')('a red rose', num_inference_steps=1, size=16)


@tries(15)
@given(data=st.data())
def test_model_configs(model, data):
    name = data.draw(st.sampled_from([*CONFIGS, 'vocabulary.json', 'train_settings.json']))
    original = (model / name).read_bytes()
    content = data.draw(
        changed(json.loads(original)).map(lambda v: json.dumps(v).encode()) | damaged(original)
    )
    (model / name).write_bytes(content)
    try:
        read(draw, model)
    finally:
        (model / name).write_bytes(original)


@tries(8)
@given(data=st.data())
def test_weights(model, data):
    "The first 2 KB of a safetensors file are its header."
    path = data.draw(st.sampled_from(sorted(model.glob('*/*.safetensors'))))
    original = path.read_bytes()
    path.write_bytes(data.draw(damaged(original[:2000])) + original[2000:])
    try:
        read(draw, model)
    finally:
        path.write_bytes(original)


# --- Records of a run ---------------------------------------------------------------------------------

EVENTS = [
    dict(event='start', time=1.5, run_id='a'),
    dict(event='step', step=1, loss=0.5, samples_per_second=80.0, total=9, time=2),
    dict(event='validation', step=2, loss=0.4, levels={'100': 0.3}, time=3),
    dict(event='note', text='a rose', time=4),
]


@tries(60)
@given(
    data=damaged(table('jsonl', EVENTS) + b'\n')
    | changed(EVENTS).map(lambda v: table('jsonl', v) if isinstance(v, list) else b'')
)
def test_events(small_workspace, data):
    from flowerdiff.apps.run_browser import read_events as read_curves
    from flowerdiff.pipeline.progress import Messages, how_far
    from flowerdiff.services.tracking import curve, read_events, scalars

    run = small_workspace.work / 'train-0'
    run.mkdir(parents=True, exist_ok=True)
    (run / 'events.jsonl').write_bytes(data)
    events, _ = read_events(run / 'events.jsonl')
    curve(events)
    for event in events:
        scalars(event)
    read_curves(run)
    str(how_far(small_workspace, 'train', 0))
    '\n'.join(Messages(small_workspace, 0).new())


@pytest.fixture(scope='module')
def small_workspace(tmp_path_factory):
    "A workspace in which nothing has run."
    from flowerdiff.core.workspace import open_workspace

    return open_workspace(tmp_path_factory.mktemp('ws'))


LOCK = dict(
    schema='2.0',
    stages=dict(
        prepare=dict(
            cmd='python',
            deps=[dict(path='.flowerdiff/state/source.json', md5='0')],
            params={'params.yaml': dict(seed=0)},
            outs=[dict(path='pictures', md5='0.dir')],
        )
    ),
)
RECORDS = {
    'dvc.lock': LOCK,
    'work/records/prepare.json': dict(status='done', reason='', summary='48 pictures', seconds=1.5),
    '.flowerdiff/hashes.json': dict(pictures=dict(state={}, md5='0.dir')),
    '.flowerdiff/inputs/prepare.json': {'.flowerdiff/state/source.json': {}},
}


@tries(40)
@given(data=st.data())
def test_records(small_workspace, monkeypatch_module, data):
    from flowerdiff.pipeline.status import status

    name = data.draw(st.sampled_from(sorted(RECORDS)))
    original = json.dumps(RECORDS[name]).encode()
    content = data.draw(changed(RECORDS[name]).map(lambda v: json.dumps(v).encode()) | damaged(original))
    for path, value in RECORDS.items():
        (small_workspace.root / path).parent.mkdir(parents=True, exist_ok=True)
        (small_workspace.root / path).write_text(json.dumps(value), encoding='utf-8')
    (small_workspace.root / name).write_bytes(content)
    try:
        read(status, str(small_workspace.root))
    finally:
        shutil.rmtree(small_workspace.work)
        (small_workspace.root / 'dvc.lock').unlink()


@pytest.fixture(scope='module')
def monkeypatch_module():
    "The code's fingerprints, which take a second each time, are left out."
    with pytest.MonkeyPatch.context() as patch:
        text = json.dumps({'prepare.source': 'garden'})
        patch.setattr(
            'flowerdiff.pipeline.changes.input_texts', lambda ws: {'.flowerdiff/state/source.json': text}
        )
        yield patch


# --- The locale ---------------------------------------------------------------------------------------


def test_a_locale_without_utf8(tmp_path):
    done = flowerdiff('init', 'Blüten', cwd=tmp_path, env=dict(LC_ALL='C', PYTHONUTF8='0'))
    assert (done.returncode, [path.name for path in tmp_path.iterdir()]) == (0, ['Blüten']), done.stderr
