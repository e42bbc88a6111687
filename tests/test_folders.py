"Captions in every form that people have them: random folders, and slips that must not pass silently."

import csv
import io
import json
import os
import random
import tarfile
import unicodedata
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

import pytest
from PIL import Image

from flowerdiff.core.errors import UserError
from flowerdiff.core.workspace import open_workspace, read_jsonl
from flowerdiff.data.scan import scan_folder
from flowerdiff.data.splits import official_split
from flowerdiff.data.unpacking import unpack_source

WORDS = ('rose', 'tulip', 'daisy', 'Grün', 'vase, wall', 'it\'s "red"')
FOLDERS = ('', 'train', 'train/roses', 'Bilder/weiß', 'my photos', 'images')


def picture(path: Path, color: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (color * 37 % 256, color * 91 % 256, color % 256)).save(path)


# ---- random folders

SPELLINGS = {
    'plain': lambda name, folder, root: name,
    'dot': lambda name, folder, root: f'./{name}',
    'backslash': lambda name, folder, root: name.replace('/', '\\'),
    'absolute': lambda name, folder, root: str(root / folder / name),
    'elsewhere': lambda name, folder, root: f'C:\\sets\\{folder}\\{name}'.replace('/', '\\'),
    'folder in front': lambda name, folder, root: f'{os.path.basename(folder) or root.name}/{name}',
    'case': lambda name, folder, root: name.swapcase(),
    'stem': lambda name, folder, root: os.path.splitext(name)[0],
    'percent': lambda name, folder, root: quote(name),
    'nfd': lambda name, folder, root: unicodedata.normalize('NFD', name),
}


def jsonl(path: Path, rows: list, rng):
    encoding = rng.choice(('utf-8', 'utf-8-sig', 'utf-16'))
    path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n', encoding)


def json_list(path: Path, rows: list, rng):
    path.write_text(json.dumps(rows, indent=rng.choice((None, 1))), 'utf-8')


def table(path: Path, rows: list, rng):
    text = io.StringIO()
    writer = csv.DictWriter(
        text, rows[0], delimiter=rng.choice(',;\t|'), lineterminator=rng.choice(('\n', '\r\n'))
    )
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(rng.choice(('utf-8', 'utf-8-sig', 'cp1252', 'utf-16'))))


def parquet(path: Path, rows: list, rng):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    'metadata.jsonl': jsonl,
    'metadata.json': json_list,
    'metadata.csv': table,
    'metadata.parquet': parquet,
}


def random_folder(root: Path, rng) -> dict:  # picture -> its captions
    "Make a folder in which every picture has one to three captions, in a form of its own for each subfolder."
    expected = {}
    for folder in rng.sample(FOLDERS, rng.randint(1, 3)):
        names = [
            f'{rng.choice(("a", "B b", "ü", "x.y"))}{i}.{rng.choice(("png", "jpg"))}'
            for i in range(rng.randint(1, 4))
        ]
        for name in names:
            picture(root / folder / name)
        form = rng.choice((*WRITERS, '.txt', '.caption'))
        captions = {
            name: [f'{rng.choice(WORDS)} {k} {name[0]}' for k in range(rng.randint(1, 3))] for name in names
        }
        if form in WRITERS:
            column = rng.choice(('file_name', 'image', 'file', 'path', 'filename', 'image_path'))
            spell = SPELLINGS[rng.choice([*SPELLINGS])]
            rows = [
                {column: spell(name, folder, root), 'text': text} for name in names for text in captions[name]
            ]
            WRITERS[form](root / folder / form, rows, rng)
        else:
            for name in names:
                sidecar = os.path.splitext(name)[0] + form
                (root / folder / sidecar).write_text('\n'.join(captions[name]), 'utf-8')
                captions[name] = ['\n'.join(captions[name])]
        expected |= {os.path.join(folder, name): captions[name] for name in names}
    return expected


def read_captions(root: Path) -> tuple:  # picture -> captions, facts
    scan = scan_folder(root, 10_000)
    found = {}
    for name in scan.names:
        texts = scan.metadata.texts(name)
        found[name] = [*texts.get('text', []), *texts.get('sidecar', [])]
    return found, scan.facts


@pytest.mark.parametrize('block', range(4))
def test_random_folders(tmp_path, block):
    "All captions end up at their picture, and nothing is reported that was not lost."
    for seed in range(50 * block, 50 * block + 50):
        root = tmp_path / f'set{seed}'
        expected = random_folder(root, random.Random(seed))
        found, facts = read_captions(root)
        assert found == expected, f'seed {seed}'
        assert (facts['unmatched'], facts['not_used']) == ([], []), f'seed {seed}'


def test_lost_captions_are_listed(tmp_path):
    "A row or caption file whose picture was removed is counted, and never given to another picture."
    for seed in range(30):
        root = tmp_path / f'set{seed}'
        rng = random.Random(seed)
        expected = random_folder(root, rng)
        gone = rng.choice([*expected])
        rows = expected.pop(gone)
        (root / gone).unlink()
        found, facts = read_captions(root)
        assert found == expected, f'seed {seed}'
        used = facts['rows'] - facts['matched']
        assert used == len(rows) or not expected or (used == 0 and gone not in found), f'seed {seed}'


# ---- nothing silently


@pytest.mark.parametrize(
    'name, right',
    [
        ('metadata.json1', 'metadata.jsonl'),
        ('Metadata.jsonl', 'metadata.jsonl'),
        ('captions.jsonl', 'metadata.jsonl'),
        ('metadata.jsonl.txt', 'metadata'),
        ('metadata.ndjson', 'metadata.jsonl'),
        ('flowers.json', 'metadata.json'),
        ('labels.csv', 'metadata.csv'),
        ('metadata.tsv', 'metadata.csv'),
        ('captions.txt', 'metadata.csv'),
        ('captions.parquet', 'metadata.parquet'),
    ],
)
def test_unused_files_are_named(tmp_path, name, right):
    "A file that looks like captions and was not used is reported with the name that it should have."
    for i in range(3):
        picture(tmp_path / f'{i}.png', i)
    rows = [dict(file_name=f'{i}.png', text=f'rose {i}') for i in range(3)]
    writers = {'.csv': table, '.tsv': table, '.parquet': parquet, '.json': json_list}
    writers.get(Path(name).suffix, jsonl)(tmp_path / name, rows, random.Random(1))
    scan = scan_folder(tmp_path, 100)
    assert sorted(scan.names) == ['0.png', '1.png', '2.png']
    [unused] = scan.facts['not_used']
    assert unused['file'] == name and right in unused['reason']


def test_documents_are_no_captions(tmp_path):
    for i in range(3):
        picture(tmp_path / f'{i}.png', i)
    for name in ('README.txt', 'LICENSE.txt', 'classes.txt', 'requirements.txt', 'notes.md'):
        (tmp_path / name).write_text('rose\ntulip\n')
    (tmp_path / 'sizes.csv').write_text('width,height\n8,8\n')
    (tmp_path / 'dataset.json').write_text('{"version": 1}')
    scan = scan_folder(tmp_path, 100)
    assert scan.facts['not_used'] == scan.facts['unmatched'] == []
    assert {file.reason for file in scan.left_out} == {'is not a picture'}


def test_ambiguous_names_are_not_guessed(tmp_path):
    for name in ('roses/1.png', 'lilies/1.png', 'a.png', 'a.jpg', 'only/2.png'):
        picture(tmp_path / name)
    rows = [dict(file_name=name, text=name) for name in ('1.png', 'a', 'poppies/2.png', 'only/2.jpg')]
    jsonl(tmp_path / 'metadata.jsonl', rows, random.Random(0))
    found, facts = read_captions(tmp_path)
    assert not any(found.values())
    assert (facts['rows'], facts['matched'], len(facts['unmatched'])) == (4, 0, 4)


def test_several_rows_are_several_values(tmp_path):
    picture(tmp_path / 'a.png')
    rows = [dict(file_name='a.png', captions=['x', 'y'], n=i, prompt={'en': 'z'}) for i in range(3)]
    jsonl(tmp_path / 'metadata.jsonl', rows, random.Random(0))
    texts = scan_folder(tmp_path, 10).metadata.texts('a.png')
    assert texts == dict(captions=[['x', 'y']] * 3, n=[0, 1, 2], prompt=[{'en': 'z'}] * 3)


def test_csv_mistakes(tmp_path):
    "Unquoted commas, a missing header and an open quote: captions arrive, or their lines are listed."
    for i in range(5):
        picture(tmp_path / f'{i}.png', i)
    (tmp_path / 'metadata.csv').write_text(
        '0.png,a rose, red, in a vase\n1.png,a lily\n2.png,"open\n3.png,lost\n4.png,also\n'
    )
    found, facts = read_captions(tmp_path)
    assert found['0.png'] == ['a rose, red, in a vase'] and found['1.png'] == ['a lily']
    assert facts['rows'] - facts['matched'] >= 3 and len(facts['notes']) == 2


# ---- containers


def flowers_parquet(path: Path, n: int = 6):
    import datasets

    pictures = [Image.new('RGB', (96, 96), (i * 40, 255 - i * 30, i * 13)) for i in range(n)]
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value('string'),
        label=datasets.ClassLabel(names=['rose', 'lily']),
    )
    columns = dict(image=pictures, text=[f'flower {i}' for i in range(n)], label=[i % 2 for i in range(n)])
    data = datasets.Dataset.from_dict(columns, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        data.to_parquet(path)
    else:
        data.save_to_disk(path)


@pytest.mark.parametrize('name', ['data/validation-00000-of-00001.parquet', 'validation'])
def test_datasets(tmp_path, name):
    "Pictures, captions, class names and splits come out of Parquet files and of `save_to_disk`."
    flowers_parquet(tmp_path / 'set' / name)
    unpacked = unpack_source(tmp_path / 'set', tmp_path / 'work')
    scan = scan_folder(unpacked.folder, 100)
    assert len(scan.names) == 6 and scan.facts['matched'] == 6
    rows = [scan.metadata.row(name) for name in sorted(scan.names)]
    assert [row['text'] for row in rows] == [f'flower {i}' for i in range(6)]
    assert [row['label'] for row in rows] == ['rose', 'lily'] * 3
    assert {official_split(scan.names[0], row) for row in rows} == {'val'}
    assert unpack_source(tmp_path / 'set', tmp_path / 'work') == unpacked  # a second time


def test_webdataset(tmp_path):
    "Members of a tar file with one key belong together. One that would leave the folder is not written."
    png = io.BytesIO()
    Image.new('RGB', (8, 8)).save(png, 'png')
    members = {'0.png': png.getvalue(), '0.txt': b'a rose', '0.cls': b'rose', '1.png': png.getvalue()}
    members |= {'1.json': b'{"caption": "a lily"}', '../evil.png': png.getvalue()}
    (tmp_path / 'set').mkdir()
    with tarfile.open(tmp_path / 'set/test-000.tar', 'w') as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    folder = unpack_source(tmp_path / 'set', tmp_path / 'work').folder
    scan = scan_folder(folder, 100)
    assert scan.names == ['test-000.tar/0.png', 'test-000.tar/1.png']
    assert scan.metadata.texts(scan.names[0])['sidecar'] == ['a rose']
    assert scan.metadata.texts(scan.names[1])['caption'] == ['a lily']
    row = scan.metadata.row(scan.names[0])
    assert row['label'] == 'rose' and official_split(scan.names[0], row) == 'test'
    assert not list(tmp_path.rglob('evil.png'))


# ---- the whole stage


def kohya(root: Path):
    for i in range(6):
        folder = '10_sks flower' if i < 3 else '5_flower'
        picture(root / folder / f'{i}.png', 3 * i + 1)
        (root / folder / f'{i}.txt').write_text(f'sks flower {i}')


def test_prepare_kohya(tmp_path):
    "Captions, class and repeats of a Kohya folder are in what prepare writes."
    from flowerdiff.stages.prepare import run

    kohya(tmp_path / 'set')
    small = {'prepare.source': str(tmp_path / 'set'), 'prepare.resolution': 16}
    prepared = run(tmp_path / 'ws', 'folder', small)
    texts = {row['file_name']: row['texts'] for row in read_jsonl(prepared.folder / 'texts.jsonl')}
    rows = {
        f'{split}/{row["file_name"]}': row
        for split in ('train', 'val', 'test')
        for row in read_jsonl(prepared.folder / split / 'metadata.jsonl')
    }
    assert len(rows) == 6 and set(texts) == set(rows)
    for name, row in rows.items():
        number = int(Path(row['source']).stem)
        assert texts[name]['sidecar'] == [f'sks flower {number}']
        assert (row['label'], row['repeats']) == (('sks flower', 10) if number < 3 else ('flower', 5))
    assert prepared.info['left_out'] == 0 and prepared.info['metadata']['sidecars'] == 6


def test_prepare_hub(tmp_path):
    "A data set of the Hub is read from the cache, and its commit is recorded."
    from flowerdiff.stages.prepare import run

    cache = tmp_path / 'snapshots/c0ffee'
    flowers_parquet(cache / 'data/train-00000-of-00001.parquet')
    settings = {'prepare.source': 'hub:ada/flowers', 'prepare.resolution': 64}
    with patch('huggingface_hub.snapshot_download', return_value=str(cache)):
        prepared = run(tmp_path / 'ws', 'folder', settings)
    assert prepared.info['source_commit'] == 'c0ffee' and sum(prepared.info['counts'].values()) == 6
    assert set(prepared.info['labels']) == {'rose', 'lily'}


def test_hub_offline(tmp_path, monkeypatch):
    "Without network and cache there is one line."
    from flowerdiff.stages.prepare import source_folder

    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    ws = open_workspace(tmp_path / 'ws', 'folder', {'prepare.source': 'hub:ada/no-such-set-here'})
    with pytest.raises(UserError, match='cannot be reached; run again'):
        source_folder(ws)
