"Real folders of pictures: bad files are listed with a reason, and the run continues."

import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from flowerdiff.core.schema import UserError
from flowerdiff.core.workspace import read_json, read_jsonl
from flowerdiff.data import image_folder
from flowerdiff.data.images import load_picture
from flowerdiff.services.image_files import MAX_PIXELS, BadPicture
from flowerdiff.stages import caption, prepare

SIDE = 32


def noise(i, size=(40, 48), smooth=6):  # a picture that is like no other
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (smooth, smooth, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )


def claims(width, height):  # a PNG whose header promises so many pixels
    b = io.BytesIO()
    Image.new('L', (8, 8)).save(b, 'PNG')
    data = bytearray(b.getvalue())
    data[16:24] = struct.pack('>II', width, height)
    data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.fixture
def photos(tmp_path):  # twelve good pictures, two classes
    for i in range(12):
        f = tmp_path / 'photos' / ('rose', 'lily')[i % 2] / f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(f)
    return tmp_path / 'photos'


def prepared(photos, name='ws', **settings):  # run the stage on a folder
    return prepare.run(
        photos.parent / name,
        'folder',
        {
            'prepare.source': str(photos),
            'prepare.resolution': SIDE,
            **{f'prepare.{k}': v for k, v in settings.items()},
        },
    )


def rows(result, splits=('train', 'val', 'test')):
    return {
        r['source']: dict(r, split=s)
        for s in splits
        for r in read_jsonl(result.folder / s / 'metadata.jsonl')
    }


def reasons(result):
    return {r['file']: r['reason'] for r in read_jsonl(result.folder / 'quarantine.jsonl')}


def picture(result, source):
    r = rows(result)[source]
    return np.asarray(Image.open(result.folder / r['split'] / r['file_name']).convert('RGB'), float)


def near(a, b, most=6):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < most


def one_line(e, *words):
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text


# ---- files that cannot be used


def test_bad_files_go_to_quarantine(photos):
    noise(50).save(photos / 'whole.jpg')
    data = (photos / 'whole.jpg').read_bytes()
    (photos / 'half.jpg').write_bytes(data[: len(data) // 2])
    noise(51).save(photos / 'whole.png')
    data = (photos / 'whole.png').read_bytes()
    (photos / 'half.png').write_bytes(data[: len(data) // 2])
    (photos / 'text.jpg').write_text('I am no picture')
    (photos / 'empty.png').touch()
    (photos / 'notes.txt').write_text('red ones first')
    noise(52, (1, 1)).save(photos / 'dot.png')
    noise(53, (40, 12)).save(photos / 'small.png')
    noise(54, (20000, 40)).save(photos / 'long.png')
    (photos / 'huge.png').write_bytes(claims(20000, 20000))
    os.mkfifo(photos / 'pipe.jpg')
    (photos / 'gone.jpg').symlink_to('nowhere.jpg')
    (photos / '.hidden.jpg').write_text('x')
    (photos / 'program.eps').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n')
    result = prepared(photos)
    why = reasons(result)
    expected = {
        'half.jpg': 'truncated',
        'half.png': 'truncated',
        'text.jpg': 'not a picture',
        'empty.png': 'empty',
        'notes.txt': 'not a picture',
        'dot.png': '1x1',
        'small.png': '40x12',
        'long.png': '20000x40',
        'huge.png': 'million pixels',
        'pipe.jpg': 'not a file',
        'gone.jpg': 'broken link',
        'program.eps': 'is PostScript; convert it',
    }
    assert set(why) == set(expected) and all(w in why[f] for f, w in expected.items()), why
    assert all('\n' not in r for r in why.values())
    assert len(rows(result)) == 14 and result.info['left_out'] == 12 and '12 left out' in result.summary


def test_wide_photo_is_cut_and_too_large_refused(tmp_path):
    art, wide = noise(1, (2500, 2500)), Image.new('RGB', (20000, 2500), 'blue')
    wide.paste(art, (8750, 0))
    wide.save(tmp_path / 'wide.jpg', quality=50)
    loaded = load_picture(tmp_path / 'wide.jpg', 64)
    assert loaded.width == 20000
    assert near(loaded.image, art.resize((64, 64)), 8)
    (tmp_path / 'more.png').write_bytes(claims(MAX_PIXELS // 5000 + 8, 5000))
    with pytest.raises(BadPicture, match='million'):
        load_picture(tmp_path / 'more.png', 64)


# ---- pictures that need care


def test_difficult_pictures_come_out_right(photos):
    art = noise(60, (64, 64), 3)
    want = art.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    d = photos / 'art'
    d.mkdir()
    gray = np.asarray(art.convert('L'), float)
    want_gray = art.convert('L').convert('RGB').resize((SIDE, SIDE))
    exif = Image.Exif()
    exif[0x0112] = 8
    art.rotate(-90).save(d / 'phone.jpg', quality=95, exif=exif)
    art.convert('CMYK').save(d / 'print.jpg', quality=95)
    art.save(d / 'p3.webp', lossless=True)
    art.save(d / 'moving.gif', save_all=True, append_images=[noise(61, (64, 64)), noise(62, (64, 64))])
    Image.fromarray((gray * 257).astype(np.uint16)).save(d / 'deep.png')
    Image.fromarray((gray[::-1] / 255).astype(np.float32)).save(d / 'float.tiff')
    glass = art.convert('RGBA')
    glass.paste((0, 255, 0, 0), (0, 0, 64, 32))
    glass.save(d / 'glass.png')
    q = art.quantize(200)
    q.info['transparency'] = 0
    q.putpixel((0, 0), 0)
    q.save(d / 'palette.png', transparency=bytes([0] + [255] * 199))
    result = prepared(photos)
    assert not reasons(result)
    got = {f: picture(result, f'art/{f}') for f in ('phone.jpg', 'print.jpg', 'moving.gif', 'palette.png')}
    assert all(near(im, want, 9) for im in got.values()), {
        f: np.abs(im - np.asarray(want, float)).mean() for f, im in got.items()
    }
    assert near(picture(result, 'art/deep.png'), want_gray) and near(
        picture(result, 'art/float.tiff')[::-1], want_gray
    )
    glass = picture(result, 'art/glass.png')
    assert glass[:14].min() > 245 and near(glass[18:], np.asarray(want)[18:])
    assert rows(result)['art/moving.gif']['note'] == 'first of several frames'
    for f in (result.folder / 'train').glob('*.jpg'):
        assert not Image.open(f).getexif()  # nor where it was taken


def test_right_sized_jpeg_is_kept_to_the_byte(photos):
    noise(70, (SIDE, SIDE)).save(photos / 'ready.jpg', quality=70)
    data = (photos / 'ready.jpg').read_bytes()
    result = prepared(photos)
    r = rows(result)['ready.jpg']
    assert (result.folder / r['split'] / r['file_name']).read_bytes() == data


# ---- names and links


def test_odd_names_and_loops(photos):
    for i, name in enumerate(['new\nline.png', 'Blüte 花 🌷.png', 'quote"\'.png', '-rf.png', ' space .png']):
        noise(80 + i).save(photos / name)
    with open(os.fsencode(photos) + b'/latin\xe9.png', 'wb') as f:
        noise(90).save(f, 'PNG')
    (photos / 'rose' / 'up').symlink_to(photos)
    (photos / 'self').symlink_to('self')
    (photos / 'again').symlink_to(photos / 'lily')
    result = prepared(photos)
    why = reasons(result)
    assert set(why) == {'rose/up', 'self', 'again'}
    assert {
        'new\\nline.png',
        'Blüte 花 🌷.png',
        'quote"\'.png',
        '-rf.png',
        ' space .png',
        'latin\\xe9.png',
    } <= set(rows(result)) and len(rows(result)) == 18


def test_linked_folder_outside_is_followed(photos, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    noise(99).save(tmp_path / 'elsewhere' / 'x.png')
    (photos / 'linked').symlink_to(tmp_path / 'elsewhere')
    assert rows(prepared(photos))['linked/x.png']['label'] == 'linked'


# ---- copies


def test_copies_and_near_copies(photos):
    a = Image.open(photos / 'rose' / '0.png')
    a.save(photos / 'copy.bmp')
    a.point(lambda v: min(255, v + 9)).save(photos / 'near.jpg', quality=95)
    for k in range(6):  # wherever the content's hash would put them
        b = noise(200 + k)
        b.save(photos / f'b{k}.png')
        b.resize((80, 96), Image.Resampling.BICUBIC).save(photos / f'b{k} large.png')
    result = prepared(photos, val=0.3, test=0.3)
    r = rows(result)
    assert reasons(result) == {'rose/0.png': 'has the same pixels as copy.bmp'}
    assert len(result.info['near_copies']) == 7 and all(
        r[x]['split'] == 'train' for pair in result.info['near_copies'] for x in pair
    )
    assert '7 near copies' in result.summary


# ---- metadata


def write_metadata(photos, *lines):
    (photos / 'metadata.jsonl').write_text(
        '\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines) + '\n'
    )


def test_bad_metadata_lines_are_named(photos):
    write_metadata(
        photos,
        dict(file_name='rose/0.png', captions=['a red rose', '', 'one rose']),
        '{"file_name": "rose/2.png", "captions": [',
        '[]',
        dict(caption='no name'),
        dict(file_name='rose/99.png', captions=['lost']),
        dict(file_name='./lily/1.png', text='a lily', color='white', petals=6),
        dict(file_name='rose/0.png', captions=['again']),
        '',
    )
    result = prepared(photos)
    r = rows(result)
    assert {k: v.split(' (')[0] for k, v in reasons(result).items()} == {
        'metadata.jsonl line 2': 'is not JSON',
        'metadata.jsonl line 3': 'has no file_name',
        'metadata.jsonl line 4': 'has no file_name',
        'metadata.jsonl line 5': 'describes rose/99.png, which does not exist',
        'metadata.jsonl line 7': 'is a second row for rose/0.png; the first one is used',
    }
    assert (
        r['rose/0.png']['captions'] == ['a red rose', 'one rose']
        and r['lily/1.png']['captions'] == ['a lily']
        and r['lily/1.png']['attributes'] == dict(color='white', petals=6)
    )
    out = caption.run(photos.parent / 'ws')
    by = {c['captioner'] for c in read_jsonl(out.folder / 'metadata.jsonl')}
    assert by == {'given', 'labels'} and 'given 2' in out.summary


def test_metadata_that_is_no_jsonl(photos):
    (photos / 'metadata.jsonl').write_text('[{"file_name": "rose/0.png"}]')
    with pytest.raises(UserError) as e:
        prepared(photos)
    one_line(e, 'metadata.jsonl', 'no line can be used', 'one JSON object per line')


def test_names_from_a_mac(photos):  # ü in two characters in the table, in one on the disk
    noise(1).save(photos / 'Blüte.png')
    write_metadata(photos, dict(file_name='Blu\u0308te.png', text='a blossom'))
    assert rows(prepared(photos))['Blüte.png']['captions'] == ['a blossom']


# ---- splits


def test_split_is_by_content_and_by_class(photos, tmp_path):
    for i in range(12, 60):
        noise(i).save(photos / ('rose', 'lily')[i % 3 == 0] / f'{i}.png')
    a = prepared(photos, val=0.2, test=0.2)
    for n, f in enumerate(sorted(photos.rglob('*.png'))[::-1]):
        g = tmp_path / 'other' / f.parent.name / f'z{n}.png'
        g.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, g)
    b = prepared(tmp_path / 'other', 'ws2', val=0.2, test=0.2)

    def where(result):
        return {row['sha256']: row['split'] for row in rows(result).values()}

    assert where(a) == where(b) and a.info['counts'] == dict(train=36, val=12, test=12)
    for s in ('val', 'test'):
        assert {'rose', 'lily'} == {x['label'] for x in read_jsonl(a.folder / s / 'metadata.jsonl')}


def test_official_split_only_when_asked(photos):
    says = ['train', 'valid', 'test'] + ['train'] * 9
    write_metadata(
        photos,
        *(
            dict(file_name=str(f.relative_to(photos)), official_split=s)
            for f, s in zip(sorted(photos.rglob('*.png')), says)
        ),
    )
    first = sorted(str(f.relative_to(photos)) for f in photos.rglob('*.png'))
    r = rows(prepared(photos, split='official'))
    assert [r[f]['split'] for f in first] == [s.replace('valid', 'val') for s in says]
    r = rows(prepared(photos, 'ws2', val=0.25, test=0.25))
    assert sum(x['split'] == 'val' for x in r.values()) == 3
    (photos / 'metadata.jsonl').unlink()
    with pytest.raises(UserError) as e:
        prepared(photos, 'ws3', split='official')
    one_line(e, 'prepare.split', 'val or test')


def test_at_most_count_pictures(photos):
    assert len(rows(prepared(photos, count=5))) == 5


# ---- folders that cannot be used


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda d: None, ('does not exist',)),
        (lambda d: d.mkdir(), ('0 pictures', 'at least 3')),
        (lambda d: d.write_text('x'), ('is a file',)),
        (lambda d: (d.mkdir(), noise(1).save(d / 'a.png')), ('1 picture that', 'at least 3')),
        (
            lambda d: (d.mkdir(), (d / 'a.jpg').write_text('x')),
            ('0 pictures', '1 left out', 'a.jpg, which is not a picture'),
        ),
    ],
)
def test_unusable_folders(tmp_path, make, words):
    make(tmp_path / 'pics')
    with pytest.raises(UserError) as e:
        prepared(tmp_path / 'pics')
    one_line(e, *words)
    assert not (tmp_path / 'ws' / 'pictures').exists()


def test_workspace_inside_and_around_the_pictures(photos):
    result = prepare.run(photos / 'ws', 'folder', {'prepare.source': str(photos), 'prepare.resolution': SIDE})
    again = prepare.run(photos / 'ws')
    assert again.info['fingerprint'] == result.info['fingerprint']  # it does not eat what it made
    with pytest.raises(UserError) as e:
        prepare.run(photos / 'ws', overrides={'prepare.source': str(photos / 'ws' / 'pictures')})
    one_line(e, 'inside the workspace')


# ---- stopped, read-only, full


def test_continues_after_an_interruption(photos, monkeypatch):
    for i in range(12, 40):
        noise(i).save(photos / f'{i}.png')
    real = image_folder.crop_picture
    made = []

    def die_at(n):
        def f(task):
            if len(made) == n:
                raise KeyboardInterrupt
            made.append(task.source)
            return real(task)

        return f

    monkeypatch.setattr(image_folder, 'crop_picture', die_at(25))
    with pytest.raises(KeyboardInterrupt):
        prepared(photos)
    assert not (photos.parent / 'ws' / 'pictures').exists()
    made.clear()
    monkeypatch.setattr(image_folder, 'crop_picture', die_at(-1))
    result = prepared(photos)
    assert (
        len(made) == 15
        and len(rows(result)) == 40
        and not list((photos.parent / 'ws' / 'work').glob('prepare-*'))
    )
    noise(77).save(photos / '38.png')
    made.clear()
    fresh = prepared(photos)
    assert len(made) == 40 and fresh.info['fingerprint'] != result.info['fingerprint']


@pytest.mark.parametrize(
    'code, words', [(errno.ENOSPC, 'the disk is full; make room and run again'), (errno.EROFS, 'read-only')]
)
def test_disk_errors_lose_nothing(photos, monkeypatch, code, words):
    old = prepared(photos)
    before = {f: f.read_bytes() for f in old.folder.rglob('*') if f.is_file()}
    noise(300).save(photos / 'one more.png')
    real, n = Image.Image.save, []

    def save(self, *a, **k):
        n.append(1)
        if len(n) > 5:
            raise OSError(code, os.strerror(code), str(a[0]))
        return real(self, *a, **k)

    monkeypatch.setattr(Image.Image, 'save', save)
    with pytest.raises(UserError) as e:
        prepared(photos)
    one_line(e, words)
    monkeypatch.undo()
    assert {f: f.read_bytes() for f in old.folder.rglob('*') if f.is_file()} == before
    assert len(rows(prepared(photos))) == 13


SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk} && cd {disk} && {python} - <<'END'
import subprocess
from flowerdiff.stages.prepare import run
from flowerdiff.core.workspace import UserError
settings = {{'prepare.source': {photos!r}, 'prepare.resolution': 32}}
if {readonly}: subprocess.run(['mount', '-o', 'remount,ro', {disk!r}], check=True)
try: run({disk!r} + '/ws', 'folder', settings)
except UserError as e: print('ERROR', e)
END"""


@pytest.mark.skipif(
    subprocess.run(['unshare', '-rm', 'true'], capture_output=True).returncode != 0
    if shutil.which('unshare')
    else True,
    reason='no namespaces here',
)
@pytest.mark.parametrize(
    'size, readonly, words', [('200k', False, 'the disk is full'), ('1m', True, 'read-only')]
)
def test_a_real_small_disk(photos, size, readonly, words):
    for i in range(12, 120):
        noise(i, (32, 32), 32).save(photos / f'{i}.png')
    disk = photos.parent / 'disk'
    disk.mkdir()
    script = SMALL_DISK.format(
        size=size, disk=str(disk), photos=str(photos), python=sys.executable, readonly=readonly
    )
    p = subprocess.run(['unshare', '-rm', 'bash', '-c', script], capture_output=True, text=True)
    assert any(line.startswith('ERROR') and words in line for line in p.stdout.splitlines()), (
        p.stdout + p.stderr
    )


# ---- captions


def test_folder_without_captions_or_labels(tmp_path):
    (tmp_path / 'IMG').mkdir()
    for i in range(5):
        noise(i).save(tmp_path / 'IMG' / f'{i}.png')
    prepared(tmp_path / 'IMG')
    out = caption.run(tmp_path / 'ws')
    assert {tuple(r['captions']) for r in read_jsonl(out.folder / 'metadata.jsonl')} == {
        ('a picture',)
    } and 'nothing' in out.summary


def test_subfolders_become_labels(photos):
    prepared(photos)
    out = caption.run(photos.parent / 'ws')
    said = read_jsonl(out.folder / 'metadata.jsonl')
    assert all(len(set(r['captions'])) == 3 and r['captioner'] == 'labels' for r in said)
    labels = {
        f'{s}/{r["file_name"]}': r['label']
        for s in ('train', 'val', 'test')
        for r in read_jsonl(out.pictures / s / 'metadata.jsonl')
    }
    assert all(labels[r['file_name']] in c for r in said for c in r['captions'])
    with pytest.raises(UserError) as e:
        caption.run(photos.parent / 'ws', overrides={'caption.captioner': 'given'})
    one_line(e, 'caption.captioner', 'no picture has captions')
    assert read_jsonl(out.folder / 'metadata.jsonl') == said


def test_lint_finds_problems(photos):
    write_metadata(
        photos,
        *(
            dict(
                file_name=str(f.relative_to(photos)),
                captions=[
                    'this flower has petals',
                    'this flower has ' + 'many ' * (90 if i == 0 else 3) + f'parts {i}',
                ],
            )
            for i, f in enumerate(sorted(photos.rglob('*.png')))
        ),
    )
    prepared(photos)
    out = caption.run(photos.parent / 'ws')
    lint = read_json(out.folder / 'lint.json')
    assert (
        lint['too_long'] == 1
        and lint['opening'] == 'this flower has'
        and lint['opening_share'] == 1
        and lint['repeated'] == 12
    )
    assert 'begin with' in lint['findings'] and '\n' not in lint['findings']


# ---- the garden


def test_garden_is_the_same_with_workers_and_without(tmp_path, monkeypatch):
    a = prepare.run(tmp_path / 'a', 'garden', {'prepare.count': 200})
    monkeypatch.setattr(prepare, 'map_in_order', lambda function, items, workers=None: map(function, items))
    b = prepare.run(tmp_path / 'b', 'garden', {'prepare.count': 200})
    c = prepare.run(tmp_path / 'c', 'garden', {'prepare.count': 200, 'seed': 1})
    assert a.info['fingerprint'] == b.info['fingerprint'] != c.info['fingerprint']
    train, val = (
        read_jsonl(a.folder / 'train' / 'metadata.jsonl'),
        read_jsonl(a.folder / 'val' / 'metadata.jsonl'),
    )
    seen = {prepare.combination(r) for r in train}
    held = {tuple(x) for x in a.info['held_out']}
    assert (
        len(train) == 180
        and not seen & held
        and sum(prepare.combination(r) in held for r in val) == len(val) // 2 > 0
    )
    assert not {r['sha256'] for r in train} & {r['sha256'] for r in val}


def test_datasets_opens_it(tmp_path):
    datasets = pytest.importorskip('datasets')
    prepare.run(tmp_path / 'a', 'garden', {'prepare.count': 12})
    d = datasets.load_dataset(
        'imagefolder', data_dir=str(tmp_path / 'a' / 'pictures'), cache_dir=str(tmp_path / 'cache')
    )
    assert (
        {k: len(v) for k, v in d.items()} == dict(train=10, validation=1, test=1)
        and d['train'][0]['species'] in prepare.SPECIES
        and d['train'][0]['image'].size == (64, 64)
    )
