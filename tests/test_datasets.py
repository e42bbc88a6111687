"Oxford 102 and CelebA: official files, complete and broken, from a disk and from a server."

import hashlib
import http.server
import io
import itertools
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json
from flowerdiff.core.workspace import read_jsonl
from flowerdiff.data import datasets
from flowerdiff.data.celeba_captions import describe_face
from flowerdiff.data.datasets import CELEBA, DATASETS, attribute_rows
from flowerdiff.services import downloads as fetch
from flowerdiff.stages import caption, encode, prepare, train

SHARED = Path(__file__).parents[2] / 'shared' / 'data'
SMALL = {'prepare.resolution': 32}


def one_line(e, *words):
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text


def rows(result):
    return {
        Path(r['source']).name: dict(r, split=s)
        for s in ('train', 'val', 'test')
        for r in read_jsonl(result.folder / s / 'metadata.jsonl')
    }


def jpeg(i, size=(48, 40)) -> bytes:  # a picture that is like no other
    im, b = (
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        ),
        io.BytesIO(),
    )
    im.save(b, 'JPEG', quality=90)
    return b.getvalue()


def pack(archive: Path, files: dict):
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive, 'w') as z:
            [z.writestr(k, v) for k, v in files.items()]
        return
    with tarfile.open(archive, 'w:gz') as t:
        for k, v in files.items():
            m = tarfile.TarInfo(k)
            m.size, m.type = len(v), tarfile.DIRTYPE if k.endswith('/') else tarfile.REGTYPE
            m.mode = 0o755
            t.addfile(m, io.BytesIO(v))


def oxford(
    folder: Path, n=12, pictures=None
) -> Path:  # n labels, and an archive of as many pictures, or of other ones
    folder.mkdir(parents=True, exist_ok=True)
    pack(
        folder / '102flowers.tgz',
        {'jpg/': b''} | {f'jpg/image_{i:05}.jpg': jpeg(i) for i in pictures or range(1, n + 1)},
    )
    savemat(
        folder / 'imagelabels.mat',
        dict(labels=np.array([[77, 73, 1, 102][i % 4] for i in range(n)], np.uint8)[None]),
    )
    savemat(
        folder / 'setid.mat',
        dict(
            trnid=np.arange(5, n + 1, dtype=np.uint16)[None],
            valid=np.array([[1, 3]]),
            tstid=np.array([[2, 4]]),
        ),
    )
    return folder


def faces(n):
    return [
        {k: 1 if x else -1 for k, x in zip(CELEBA, np.random.default_rng(i).random(40) < 0.25)}
        for i in range(n)
    ]


def celeba(folder: Path, n=10, archive=True, table=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {f'img_align_celeba/{i:06}.jpg': jpeg(100 + i, (44, 54)) for i in range(1, n + 1)}
    if archive:
        pack(folder / 'img_align_celeba.zip', files)
    else:
        (folder / 'img_align_celeba').mkdir()
        [(folder / k).write_bytes(v) for k, v in files.items()]
    lines = [
        str(n),
        ' '.join(CELEBA) + ' ',
        *(f'{i:06}.jpg ' + ' '.join(f'{v:2}' for v in f.values()) for i, f in enumerate(faces(n), 1)),
    ]
    (folder / 'list_attr_celeba.txt').write_text('\r\n'.join(table(lines) if table else lines) + '\r\n')
    (folder / 'list_eval_partition.txt').write_text(
        ''.join(f'{i:06}.jpg {0 if i <= n - 4 else 1 if i <= n - 2 else 2}\n' for i in range(1, n + 1))
    )
    return folder


def prepared(tmp, profile, files='', **settings):
    return prepare.run(
        tmp / 'ws',
        profile,
        SMALL | {'prepare.files': str(files)} | {f'prepare.{k}': v for k, v in settings.items()},
    )


# ---- the official layouts


def test_oxford_from_its_archive(tmp_path):
    result = prepared(tmp_path, 'flowers102', oxford(tmp_path / 'files'), split='official')
    r = rows(result)
    assert {k: x['split'] for k, x in r.items()} == {
        f'image_{i:05}.jpg': {1: 'val', 3: 'val', 2: 'test', 4: 'test'}.get(i, 'train') for i in range(1, 13)
    }
    assert [r[f'image_{i:05}.jpg']['label'] for i in (1, 2, 3, 4)] == [
        'passion flower',
        'water lily',
        'pink primrose',
        'blackberry lily',
    ]
    assert result.info['left_out'] == 0 and not list((tmp_path / 'ws' / 'work').glob('prepare-*'))
    said = read_jsonl(
        caption.run(tmp_path / 'ws', overrides={'caption.captioner': 'labels'}).folder / 'metadata.jsonl'
    )
    assert all(
        any(x['label'] in c for c in s['captions'])
        for s, x in zip(
            said,
            sorted(r.values(), key=lambda x: (['train', 'val', 'test'].index(x['split']), x['file_name'])),
        )
    )


def test_oxford_unpacked_is_the_same_and_not_copied(tmp_path):
    a = prepared(tmp_path / 'a', 'flowers102', oxford(tmp_path / 'files'))
    with tarfile.open(tmp_path / 'files' / '102flowers.tgz') as t:
        t.extractall(tmp_path / 'files', filter='data')
    (tmp_path / 'files' / '102flowers.tgz').unlink()
    b = prepared(tmp_path / 'b', 'flowers102', tmp_path / 'files')
    assert (
        a.info['fingerprint'] == b.info['fingerprint']
        and len(list((tmp_path / 'files' / 'jpg').iterdir())) == 12
    )
    (tmp_path / 'files' / 'jpg' / 'image_00007.jpg').unlink()  # some left out on purpose
    c = prepared(tmp_path / 'c', 'flowers102', tmp_path / 'files')
    assert len(rows(c)) == 11


@pytest.mark.parametrize('archive', [True, False])
def test_celeba_and_its_captions(tmp_path, archive):
    result = prepared(tmp_path, 'celeba', celeba(tmp_path / 'files', archive=archive))
    r = rows(result)
    assert [r[f'{i:06}.jpg']['split'] for i in range(1, 11)] == ['train'] * 6 + ['val'] * 2 + ['test'] * 2
    assert all(r[f'{i:06}.jpg']['attributes'] == f for i, f in enumerate(faces(10), 1))
    out = caption.run(tmp_path / 'ws')
    said = {s['file_name']: s for s in read_jsonl(out.folder / 'metadata.jsonl')}
    for x in r.values():
        s = said[f'{x["split"]}/{x["file_name"]}']
        assert s['captioner'] == 'attributes' and len(s['captions']) == 3
        for c in s['captions']:
            truth(c, x['attributes'])


@pytest.mark.skipif(not (SHARED / 'flowers').is_dir(), reason='no real photographs here')
def test_real_oxford(tmp_path):
    d = tmp_path / 'files'
    d.mkdir()
    (d / 'jpg').symlink_to(SHARED / 'flowers' / 'images')
    for f in ('imagelabels.mat', 'setid.mat'):
        shutil.copy(SHARED / 'flowers' / f, d)
        assert fetch.md5_of(d / f) in {t.md5 for t in DATASETS['oxford102'].tables}
    r = rows(
        prepare.run(
            tmp_path / 'ws',
            'flowers102',
            {
                'prepare.files': str(d),
                'prepare.split': 'official',
                'prepare.count': 400,
                'prepare.resolution': 64,
            },
        )
    )
    official = {Path(x['file_name']).name: x for x in read_jsonl(SHARED / 'flowers' / 'metadata.jsonl')}
    near = sum(
        x['split'] != official[k]['official_split'].replace('valid', 'val') for k, x in r.items()
    )  # near copies stay in training
    assert len(r) > 390 and all(x['label'] == official[k]['class_name'] for k, x in r.items()) and near <= 4


# ---- the network


class Server:
    "Files with Range, that may break off after some bytes of each answer."

    def __init__(self, files):
        self.files, self.cut, self.sent, self.asked = files, None, 0, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *a):
                pass

            def do_GET(self):
                data, start = (
                    outer.files.get(self.path),
                    int((self.headers.get('Range') or 'bytes=0-')[6:].rstrip('-')),
                )
                outer.asked.append(self.path)
                if data is None:
                    return self.send_error(404)
                if start and start >= len(data):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header('Content-Length', str(len(data) - start))
                self.end_headers()
                some = data[start:] if outer.cut is None else data[start : start + outer.cut]
                outer.sent += len(some)
                self.wfile.write(some)

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.http.server_port}'


@pytest.fixture
def server(tmp_path, monkeypatch):
    d = oxford(tmp_path / 'served')
    s = Server({f'/{f.name}': f.read_bytes() for f in d.iterdir()})

    def here(file):
        data = s.files[f'/{file.name}']
        return file._replace(url=f'{s.url}/{file.name}', size=len(data), md5=hashlib.md5(data).hexdigest())

    old = DATASETS['oxford102']
    monkeypatch.setitem(
        datasets.DATASETS,
        'oxford102',
        old._replace(archive=here(old.archive), tables=tuple(map(here, old.tables))),
    )
    monkeypatch.setenv('FLOWERDIFF_DATA', str(tmp_path / 'cache'))
    monkeypatch.setattr(fetch.time, 'sleep', lambda s: None)
    yield s
    s.http.shutdown()
    s.http.server_close()


def test_download_once_for_all_workspaces(server, tmp_path):
    a = prepared(tmp_path / 'a', 'flowers102')
    total = sum(map(len, server.files.values()))
    assert server.sent == total and sorted(
        p.name for p in (tmp_path / 'cache' / 'oxford102').iterdir()
    ) == sorted(k[1:] for k in server.files)
    b = prepared(tmp_path / 'b', 'flowers102')
    assert server.sent == total and a.info['fingerprint'] == b.info['fingerprint']


def test_broken_off_downloads_go_on(server, tmp_path):
    server.cut = 1000  # of each answer
    prepared(tmp_path, 'flowers102')
    assert server.sent == sum(map(len, server.files.values())) and server.asked.count('/102flowers.tgz') > 6


def test_a_dead_network_keeps_what_came(server, tmp_path):
    whole, server.cut = server.files['/102flowers.tgz'], 0
    cache = tmp_path / 'cache' / 'oxford102'
    cache.mkdir(parents=True)
    (cache / '102flowers.tgz.part').write_bytes(whole[:5000])
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102')
    one_line(
        e,
        'cannot be downloaded now',
        '102flowers.tgz, imagelabels.mat and setid.mat',
        str(cache),
        'prepare.files',
    )
    assert (
        len(server.asked) == 5
        and (cache / '102flowers.tgz.part').stat().st_size == 5000
        and not (tmp_path / 'ws' / 'pictures').exists()
    )
    server.cut = None
    prepared(tmp_path, 'flowers102')
    assert server.sent == sum(map(len, server.files.values())) - 5000


def test_no_network_at_all(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102')
    one_line(
        e,
        'refused',
        'get 102flowers.tgz, imagelabels.mat and setid.mat from https://www.robots.ox.ac.uk',
        'run again when there is a network',
    )


def test_wrong_md5_is_thrown_away(server, tmp_path):
    good = server.files['/setid.mat']
    server.files['/setid.mat'] = good[:-1] + b'?'
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102')
    one_line(e, '/setid.mat', 'has the MD5', hashlib.md5(good).hexdigest())
    assert not list((tmp_path / 'cache' / 'oxford102').glob('setid*'))
    server.files['/setid.mat'] = good
    prepared(tmp_path, 'flowers102')


def test_gone_from_the_server(server, tmp_path):
    del server.files['/imagelabels.mat']
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102')
    one_line(e, 'Not Found', 'imagelabels.mat')
    assert server.asked.count('/imagelabels.mat') == 1  # an answer, not a failure to try again


def test_too_small_a_disk_is_reported_first(server, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: free)
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102')
    one_line(e, 'to be downloaded, needs', 'MB there and 0.0 MB are free')
    assert not server.asked
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102', oxford(tmp_path / 'files'))
    one_line(e, '102flowers.tgz, which is to be unpacked, needs')


def test_celeba_has_to_be_fetched_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv('FLOWERDIFF_DATA', str(tmp_path / 'cache'))
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'celeba')
    one_line(
        e,
        'no program can download it',
        'img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt',
        str(tmp_path / 'cache' / 'celeba'),
        'mmlab',
    )
    celeba(tmp_path / 'cache' / 'celeba')
    assert len(rows(prepared(tmp_path, 'celeba'))) == 10


# ---- killed

KILL = """
import os, signal, sys, tarfile, zipfile
kind, n = (zipfile.ZipFile if sys.argv[1] == 'celeba' else tarfile.TarFile), 0
real = kind.extract
def extract(self, m, *a, **k):
    global n
    n += 1
    real(self, m, *a, **k)
    if n == 5: # half of the fifth file is written
        os.truncate(os.path.join(a[0], getattr(m, 'name', None) or m.filename), 300)
        os.kill(os.getpid(), signal.SIGKILL)
kind.extract = extract
from flowerdiff.stages import prepare
prepare.run(sys.argv[2], sys.argv[3], {'prepare.files': sys.argv[4], 'prepare.resolution': 32})
"""


@pytest.mark.parametrize(
    'name, make, kind', [('oxford102', oxford, tarfile.TarFile), ('celeba', celeba, zipfile.ZipFile)]
)
def test_killed_while_unpacking(tmp_path, monkeypatch, name, make, kind):
    files, profile = make(tmp_path / 'files'), {'oxford102': 'flowers102'}.get(name, name)
    done = subprocess.run(
        [sys.executable, '-c', KILL, name, tmp_path / 'ws', profile, files], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (
        len(list((tmp_path / 'ws' / 'work').glob('prepare-official-*/*/*.jpg'))) == 5
        and not (tmp_path / 'ws' / 'pictures').exists()
    )
    made, real = [], kind.extract
    monkeypatch.setattr(kind, 'extract', lambda self, m, *a, **k: (made.append(m), real(self, m, *a, **k))[1])
    result = prepared(tmp_path, profile, files)
    assert len(made) == len(rows(result)) - 4  # four were whole
    monkeypatch.undo()
    assert result.info['fingerprint'] == prepared(tmp_path / 'other', profile, files).info['fingerprint']


# ---- official files that are missing or broken


def lose(d, name):
    (d / name).unlink()


def cut(d, name):
    data = (d / name).read_bytes()
    (d / name).write_bytes(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda d: lose(d, 'setid.mat'), ('lacks setid.mat', '102flowers.tgz (or the folder jpg)')),
        (
            lambda d: (lose(d, 'setid.mat'), lose(d, '102flowers.tgz')),
            ('lacks 102flowers.tgz and setid.mat',),
        ),
        (lambda d: shutil.rmtree(d), ('is not a folder',)),
        (lambda d: cut(d, '102flowers.tgz'), ('102flowers.tgz', 'truncated')),
        (lambda d: cut(d, 'imagelabels.mat'), ('imagelabels.mat: is not a MATLAB file',)),
        (lambda d: (d / 'setid.mat').write_text('<html>moved</html>'), ('setid.mat: is not a MATLAB file',)),
        (lambda d: shutil.copy(d / 'imagelabels.mat', d / 'setid.mat'), ('setid.mat: has no trnid',)),
        (lambda d: oxford(d, 12, range(1, 12)), ('has 11 of the 12 pictures',)),
        (lambda d: oxford(d, 12, range(1, 15)), ('14 pictures and 12 rows', 'image_00013.jpg')),
        (
            lambda d: savemat(d / 'imagelabels.mat', dict(labels=np.ones((1, 9), np.uint8))),
            ('9 labels and setid.mat splits 12',),
        ),
        (lambda d: savemat(d / 'imagelabels.mat', dict(labels=np.arange(95, 107)[None])), ('the label 103',)),
        (lambda d: pack(d / '102flowers.tgz', {'images/1.jpg': jpeg(1)}), ('has no folder jpg',)),
        (lambda d: pack(d / '102flowers.tgz', {'jpg/../../../evil.jpg': jpeg(1)}), ('not safe',)),
    ],
)
def test_oxford_that_will_not_do(tmp_path, spoil, words):
    spoil(oxford(tmp_path / 'files'))
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'flowers102', tmp_path / 'files')
    one_line(e, *words)
    assert not (tmp_path / 'ws' / 'pictures').exists() and not list(tmp_path.rglob('evil.jpg'))


def test_pictures_without_a_label_in_a_folder(tmp_path):
    celeba(tmp_path / 'files', archive=False)
    (tmp_path / 'files' / 'img_align_celeba' / '000099.jpg').write_bytes(jpeg(1))
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'celeba', tmp_path / 'files')
    one_line(e, '11 pictures and 10 rows', '000099.jpg')


@pytest.mark.parametrize(
    'edit, words',
    [
        (lambda lines: lines[1:], ('line 1: is not the number of pictures', '5_o_Clock')),
        (lambda lines: ['12', *lines[1:]], ('says 12 pictures', 'has 10')),
        (lambda lines: lines[:-3], ('says 10 pictures', 'has 7')),
        (
            lambda lines: [*lines[:4], lines[4].replace('-1', '0', 1), *lines[5:]],
            ('line 5', 'is 0, not 1 or -1'),
        ),
        (lambda lines: [*lines[:4], lines[4] + ' 1', *lines[5:]], ('line 5: has 41 values', '40 columns')),
        (
            lambda lines: [lines[0], lines[1].replace('Bangs', 'Fringe'), *lines[2:]],
            ('line 2: has the column Fringe',),
        ),
        (
            lambda lines: [lines[0], lines[1].replace('Bangs ', ''), *lines[2:]],
            ('line 2: has no column Bangs',),
        ),
        (
            lambda lines: ['11', *lines[1:], lines[-1].replace('000010', '000011')],
            ('does not say in which split 000011.jpg is',),
        ),
        (lambda lines: [], ('line 1: is not the number of pictures (empty)',)),
    ],
)
def test_tables_that_will_not_do(tmp_path, edit, words):
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'celeba', celeba(tmp_path / 'files', table=edit))
    one_line(e, 'list_attr_celeba.txt' if 'split' not in words[0] else 'list_eval_partition.txt', *words)


def test_files_are_for_known_data_sets_only(tmp_path):
    with pytest.raises(UserError) as e:
        prepared(tmp_path, 'folder', tmp_path, source=str(tmp_path))
    one_line(e, 'prepare.files', 'oxford102 and celeba')


# ---- splits and crops


def test_stratified_gives_each_class_all_splits(tmp_path):
    "A picture's content decides about its split, so shares are kept on average, but no class lacks a split."
    result = prepared(
        tmp_path, 'flowers102', oxford(tmp_path / 'files', 60), split='stratified', val=0.2, test=0.1
    )
    for s, n in (('train', 11), ('val', 3), ('test', 1)):
        counts = {
            label: sum(x['label'] == label and x['split'] == s for x in rows(result).values())
            for label in ('passion flower', 'water lily', 'pink primrose', 'blackberry lily')
        }
        assert all(abs(c - n) <= 4 for c in counts.values()) and min(counts.values()) > 0, (s, counts)


def test_random_crop_is_the_pictures_own(tmp_path):
    d = oxford(tmp_path / 'files')
    a, b, c = (
        prepared(tmp_path / k, 'flowers102', d, crop=how)
        for k, how in (('a', 'random'), ('b', 'random'), ('c', 'center'))
    )
    assert a.info['fingerprint'] == b.info['fingerprint']
    assert sum(rows(a)[k]['sha256'] != rows(c)[k]['sha256'] for k in rows(a)) > 8


# ---- the sentences about a face

CLAIMS = dict(
    Attractive='attractive',
    Smiling='smiling',
    Chubby='chubby',
    Bald='bald',
    Young='young',
    Blurry='blurry',
    Bangs='bangs',
    Receding_Hairline='receding hairline',
    Bags_Under_Eyes='bags',
    Big_Lips='lips(?! ?tick)',
    Double_Chin='double chin',
    High_Cheekbones='cheekbones',
    Mouth_Slightly_Open='open mouth',
    Narrow_Eyes='narrow eyes',
    Oval_Face='oval',
    Pale_Skin='pale',
    Rosy_Cheeks='rosy',
    Black_Hair='black',
    Brown_Hair='brown',
    Blond_Hair='blond',
    Gray_Hair='gray',
    Straight_Hair='straight',
    Wavy_Hair='wavy',
    Goatee='goatee',
    Mustache='mustache',
    Sideburns='sideburns',
    Eyeglasses='glasses',
    Wearing_Hat='hat',
    Wearing_Earrings='earrings',
    Wearing_Necklace='necklace',
    Wearing_Necktie='necktie',
    Wearing_Lipstick='lipstick',
    Heavy_Makeup='heavy makeup',
    Big_Nose='big (?:pointy )?nose',
    Pointy_Nose='pointy nose',
    Arched_Eyebrows='arched',
    Bushy_Eyebrows='bushy',
    Male='man',
    No_Beard='clean-shaven',
)
CLAIMS['5_o_Clock_Shadow'] = "o'clock shadow"
WRONG = re.compile(
    r'  |\b(\w+) \1\b|with and|with wearing| and$|with$|wearing$|,,|,$|\ba [aeiou]|\ban [^aeiou]'
    r'|\b(?:a|an) (?:a|an)\b|^ | $|noses|\bhair\b.*\bhair\b|eyebrows.*eyebrows'
)
WORDS = {
    'a',
    'an',
    'this',
    'photo',
    'portrait',
    'close-up',
    'blurry',
    'of',
    'with',
    'has',
    'wears',
    'wearing',
    'and',
    'man',
    'woman',
    'hair',
    'nose',
    'eyebrows',
    'mouth',
    'under',
    'the',
    'eyes',
    'full',
    'slightly',
    'chin',
    'face',
    'skin',
    'cheeks',
    'five',
    "o'clock",
    'beard',
    'high',
}


def truth(said: str, row: dict):  # grammatical, and nothing that the row denies
    assert not WRONG.search(said), said
    for k, words in CLAIMS.items():
        if re.search(rf'\b{words}\b', said):
            assert row[k] == 1, (said, k)
    if re.search(r'\bwoman\b', said):
        assert row['Male'] == -1, said
    if re.search(r'\ba beard\b', said):
        assert row['No_Beard'] == -1 and row['Male'] == 1, said
    known = WORDS | {w for c in CLAIMS.values() for w in re.findall(r"[\w'-]+", re.sub(r'\(.*?\)', '', c))}
    assert set(re.findall(r"[\w'-]+", said)) <= known | {'lips', 'lipstick', 'big', 'pointy'}, said
    contradicts = (
        'bald.* hair',
        'straight wavy|wavy straight',
        'woman.*(?:beard|goatee|mustache|shadow|sideburns)',
        'clean-shaven.*(?:beard|goatee|mustache|shadow|sideburns)',
        'young.*gray',
        'bangs.*hairline|hairline.*bangs',
        'a beard.*goatee|goatee.*a beard',
    )
    for c in contradicts:
        assert not re.search(c, said), said


def test_claims_are_of_all_attributes():
    assert set(CLAIMS) == set(CELEBA)


@pytest.mark.parametrize('many', [1, 2])
def test_each_attribute_and_each_pair(many):
    for yes in itertools.combinations(CELEBA, many):
        row, rng = {k: 1 if k in yes else -1 for k in CELEBA}, np.random.default_rng(0)
        said = [describe_face(row, rng) for _ in range(25)]
        for s in said:
            truth(s, row)
        if many == 1 and yes[0] not in ('No_Beard', 'Goatee', 'Mustache', 'Sideburns', '5_o_Clock_Shadow'):
            assert any(re.search(rf'\b{CLAIMS[yes[0]]}\b', s) for s in said), yes
        if (many == 2 and 'Male' in yes and yes[0] != '5_o_Clock_Shadow') or yes == (
            '5_o_Clock_Shadow',
            'Male',
        ):
            assert any(re.search(rf'\b{CLAIMS[next(k for k in yes if k != "Male")]}\b', s) for s in said), yes


def test_faces_with_everything():
    for row in [
        dict.fromkeys(CELEBA, 1),
        dict.fromkeys(CELEBA, -1),
        *faces(300),
        *({k: -v for k, v in f.items()} for f in faces(100)),
    ]:
        rng = np.random.default_rng(1)
        for s in [describe_face(row, rng) for _ in range(6)]:
            truth(s, row)
            assert len(s.split()) < 45


@pytest.mark.skipif(not (SHARED / 'celeba').is_dir(), reason='no real table here')
def test_the_head_of_the_real_table():
    table, said = list(attribute_rows(SHARED / 'celeba' / 'list_attr_celeba.txt')), []
    assert (
        len(table) == 1000
        and table[0][0] == '000001.jpg'
        and table[0][1]['Smiling'] == 1
        and table[0][1]['Male'] == -1
    )
    for name, row in table:
        rng = np.random.default_rng(int(name[:6]))
        mine = [describe_face(row, rng) for _ in range(5)]
        said += mine
        for s in mine:
            truth(s, row)
    assert len(set(said)) > 0.9 * len(said)


# ---- an autoencoder of the run's own, and the command line


def test_miniature_of_the_celeba_profile_trains(tmp_path):
    "All settings of the profile but the sizes: own autoencoder, accumulation, checkpointing, streaming."
    prepared(tmp_path, 'celeba', celeba(tmp_path / 'files', 40))
    caption.run(tmp_path / 'ws')
    out = encode.run(
        tmp_path / 'ws',
        overrides={
            'components.text_encoder': 'garden',
            'encode.vae_minutes': 0.02,
            'encode.shard_records': 16,
        },
    )
    m, vae = (
        read_json(out.folder / 'manifest.json'),
        read_json(out.folder / 'components' / 'vae' / 'config.json'),
    )
    assert (
        m['shapes']['mean'] == [2, 4, 16, 16]
        and vae['_class_name'] == 'AutoencoderKL'
        and m['scaling_factor'] == vae['scaling_factor'] != 0.18215
    )  # not Stable Diffusion's
    trained = next((tmp_path / 'ws' / 'work').glob('vae-*')) / 'vae' / 'diffusion_pytorch_model.safetensors'
    when = trained.stat().st_mtime_ns
    assert (
        'as encoded before' in encode.run(tmp_path / 'ws').summary and trained.stat().st_mtime_ns == when
    )  # trained once
    with pytest.raises(UserError) as e:
        encode.run(tmp_path / 'ws', overrides={'encode.vae_features': 'nowhere.safetensors'})
    one_line(e, 'encode.vae_features', 'is not there')
    train.run(
        tmp_path / 'ws',
        overrides={
            'encode.vae_features': '',
            'train.channels': [8, 8, 16],
            'train.attention_head_dim': 8,
            'train.epochs': 2,
            'train.stream': 2,
            'train.warmup_steps': 1,
            'train.threads': 1,
        },
    )
    assert (
        read_json(tmp_path / 'ws' / 'candidate' / 'unet' / 'config.json')['sample_size'] == 16
        and read_json(tmp_path / 'ws' / 'candidate' / 'vae' / 'config.json')['scaling_factor']
        == vae['scaling_factor']
    )


def test_command_line(tmp_path):
    oxford(tmp_path / 'files')
    command = [
        sys.executable,
        '-P',
        '-c',
        'import sys; from flowerdiff.pipeline.cli import main; sys.exit(main())',
    ]
    for args in (
        ['init', 'w', '--profile', 'flowers102'],
        [
            'run',
            'w',
            '--only',
            'prepare',
            '--set',
            'prepare.files=files',
            '--set',
            'prepare.split=official',
            '--set',
            'prepare.resolution=32',
        ],
    ):
        done = subprocess.run([*command, *args], cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stdout + done.stderr
    assert read_json(tmp_path / 'w' / 'pictures' / 'info.json')['counts'] == dict(train=8, val=2, test=2)
