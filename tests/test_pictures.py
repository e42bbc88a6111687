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
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json
from flowerdiff.core.workspace import read_jsonl
from flowerdiff.data import image_folder
from flowerdiff.data.images import load_picture
from flowerdiff.garden.worlds import background_combinations
from flowerdiff.services import image_files
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


def test_your_folder_stays_as_it_is(photos):
    "Breaks if prepare moves, turns or writes anything in the folder of pictures."
    before = {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in photos.rglob('*')}
    prepared(photos)
    assert before == {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in photos.rglob('*')}


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
    assert len(result.info['near_copies']) == 7
    assert all(r[a]['split'] == r[b]['split'] for a, b in result.info['near_copies'])
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
    }
    assert (
        r['rose/0.png']['captions'] == ['a red rose', 'one rose']
        and r['lily/1.png']['captions'] == ['a lily']
        and r['lily/1.png']['attributes'] == dict(color='white', petals=6)
    )
    out = caption.run(photos.parent / 'ws', overrides={'caption.accept': 'unmatched_rows'})
    by = {c['captioner'] for c in read_jsonl(out.folder / 'metadata.jsonl')}
    assert by == {'given', 'labels'} and 'given 2' in out.summary


def test_metadata_that_is_no_jsonl(photos):
    (photos / 'metadata.jsonl').write_text('rose/0.png: a rose')
    with pytest.raises(UserError) as e:
        prepared(photos)
    one_line(e, 'metadata.jsonl', 'no row can be used', 'one row per picture')


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

    assert where(a) == where(b)
    for s in ('val', 'test'):
        assert 5 <= a.info['counts'][s] <= 20
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
    assert {x['split'] for x in r.values()} == {'train', 'val', 'test'}
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


# ---- colors


def profile_of(primaries):  # an ICC profile of an RGB color space, gamma 2.2
    def fixed(*values):
        return b''.join(struct.pack('>i', round(v * 65536)) for v in values)

    curve = b'curv' + bytes(4) + struct.pack('>IH', 1, 563) + bytes(2)
    tags = [
        (b'desc', b'desc' + bytes(4) + struct.pack('>I', 5) + b'made\0' + bytes(79)),
        (b'wtpt', b'XYZ ' + bytes(4) + fixed(0.9642, 1, 0.8249)),
        *((k, b'XYZ ' + bytes(4) + fixed(*v)) for k, v in zip((b'rXYZ', b'gXYZ', b'bXYZ'), primaries)),
        *((k, curve) for k in (b'rTRC', b'gTRC', b'bTRC')),
    ]
    table = struct.pack('>I', len(tags))
    body = b''
    for key, data in tags:
        data += bytes(-len(data) % 4)
        table += key + struct.pack('>II', 132 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack('>I', 132 + 12 * len(tags) + len(body)) + b'lcms\x02\x10\0\0mntrRGB XYZ ' + bytes(12)
    head += b'acsp' + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b'\0') + table + body


P3 = profile_of([(0.515, 0.241, -0.001), (0.292, 0.692, 0.042), (0.157, 0.067, 0.784)])


def test_profiles_are_converted_and_broken_ones_noted(photos):
    art = noise(60, (SIDE, SIDE), 3)
    srgb = ImageCms.createProfile('sRGB')
    want = ImageCms.profileToProfile(art, ImageCms.ImageCmsProfile(io.BytesIO(P3)), srgb)
    assert not near(art, want, 5)  # it matters
    glass = art.convert('RGBA')
    glass.putpixel((0, 0), (9, 9, 9, 0))
    art.save(photos / 'p3.jpg', quality=97, subsampling=0, icc_profile=P3)
    art.save(photos / 'p3.png', icc_profile=P3)
    glass.save(photos / 'glass.png', icc_profile=P3)
    art.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / 'cut.png', icc_profile=P3[:100])
    art.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(
        photos / 'named.png', icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes()
    )
    art.rotate(90).convert('CMYK').save(photos / 'print.tif', icc_profile=P3)  # of another kind
    result = prepared(photos)
    got = rows(result)
    assert near(picture(result, 'p3.jpg'), want, 2) and near(picture(result, 'p3.png'), want, 0.1)
    assert near(picture(result, 'glass.png')[1:], np.asarray(want)[1:], 0.1)
    assert tuple(picture(result, 'glass.png')[0, 0]) == (255, 255, 255)
    assert got['cut.png']['note'] == 'its color profile is damaged and was ignored'
    assert 'is for other kinds of pictures' in got['print.tif']['note'] and not reasons(result)
    assert near(picture(result, 'cut.png'), art.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0.1)
    assert near(picture(result, 'named.png'), art.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 0.01)
    assert 'its color profile is damaged' in result.summary
    for source in ('p3.png', 'p3.jpg'):
        with Image.open(result.folder / got[source]['split'] / got[source]['file_name']) as im:
            assert 'icc_profile' not in im.info


def test_background_of_transparent_pictures(photos):
    glass = Image.new('RGBA', (SIDE, SIDE), (255, 0, 0, 0))
    glass.paste((0, 0, 255, 255), (0, 0, 16, SIDE))
    glass.save(photos / 'glass.png')
    white = picture(prepared(photos), 'glass.png')
    assert tuple(white[9, 30]) == (255, 255, 255)
    teal = picture(prepared(photos, background='008080'), 'glass.png')
    assert tuple(teal[9, 30]) == (0, 128, 128) and tuple(teal[9, 3]) == (0, 0, 255)
    with pytest.raises(UserError) as e:
        prepared(photos, background='rosy')
    one_line(e, 'prepare.background', 'is not a color', 'ffcc00')


# ---- one opener


def test_images_are_opened_in_one_place():
    root = Path(image_folder.__file__).parents[1]
    where = {
        str(f.relative_to(root)) for f in root.rglob('*.py') if 'Image.open(' in f.read_text(encoding='utf-8')
    }
    assert where == {'services/image_files.py'}


def test_postscript_never_starts_a_program(photos, tmp_path, monkeypatch):
    from flowerdiff.apps.run_browser import read_picture
    from flowerdiff.data.captioning import largest_first
    from flowerdiff.data.images import open_picture
    from flowerdiff.pipeline.survey import read_header
    from flowerdiff.services.image_files import read_image

    ghost = tmp_path / 'bin' / 'gs'
    ghost.parent.mkdir()
    ghost.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n')
    ghost.chmod(0o755)
    monkeypatch.setenv('PATH', f'{ghost.parent}:{os.environ["PATH"]}')
    bad = photos / 'art.jpg'
    bad.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n%%EOF\n')
    readers = [
        lambda: open_picture(bad),
        lambda: read_image(bad),
        lambda: read_image(io.BytesIO(bad.read_bytes())),
        lambda: read_picture(photos, 'art.jpg', 64),
        lambda: largest_first(photos, ['art.jpg']),
    ]
    for reader in readers:
        with pytest.raises((UserError, BadPicture), match='is PostScript; convert it'):
            reader()
    assert read_header(bad).side == 0
    assert reasons(prepared(photos))['art.jpg'].startswith('is PostScript; convert it')
    assert not (tmp_path / 'started').exists()


def test_other_files_are_named_with_the_way_to_convert(photos, monkeypatch):
    monkeypatch.setattr(image_files, 'picture_formats', lambda: ('JPEG', 'PNG', 'TIFF'))
    noise(50).save(photos / 'camera.nef', 'TIFF')  # a preview in a raw file
    noise(51).save(photos / 'really a jpeg.nef', 'JPEG')
    (photos / 'IMG_1.HEIC').write_bytes(b'\0\0\0\x20ftypheic' + bytes(500))
    (photos / 'new.jxl').write_bytes(b'\xff\x0a' + bytes(500))
    (photos / 'logo.svg').write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    (photos / 'poster.psd').write_bytes(b'8BPS' + bytes(500))
    (photos / 'flyer.pdf').write_bytes(b'%PDF-1.4' + bytes(500))
    (photos / 'live.mov').write_bytes(b'\0\0\0\x14ftypqt  ' + bytes(500))
    result = prepared(photos)
    why = reasons(result)
    says = {
        'camera.nef': 'raw file; develop it',
        'IMG_1.HEIC': "pip install 'flowerdiff[formats]'",
        'new.jxl': "pip install 'flowerdiff[formats]'",
        'logo.svg': 'rsvg-convert',
        'poster.psd': 'magick',
        'flyer.pdf': 'pdftoppm',
        'live.mov': 'ffmpeg',
    }
    assert set(why) == set(says) and all(words in why[f] for f, words in says.items()), why
    assert 'really a jpeg.nef' in rows(result)


# ---- small pictures


def test_small_pictures_plan_suggest_and_prepare_agree(tmp_path):
    from flowerdiff.core.profiles import load_profile
    from flowerdiff.pipeline.plan import resolve_settings
    from flowerdiff.pipeline.suggest import suggested_settings

    photos = tmp_path / 'digits'
    photos.mkdir()
    for i in range(12):
        noise(i, (28, 28)).convert('L').save(photos / f'{i}.png')
    source = {'prepare.source': str(photos)}
    found = suggested_settings(tmp_path / 'w', 'folder', source)
    planned = resolve_settings(tmp_path / 'w', 'folder', source)
    assert found.overrides['prepare.resolution'] == planned.settings.prepare.resolution == 32
    assert found.survey.pictures == planned.survey.pictures == 12 and planned.survey.enlarged == 1
    result = prepared(photos)
    assert sum(result.info['counts'].values()) == 12 and '12 enlarged' in result.summary
    for act in (
        lambda: resolve_settings(tmp_path / 'w', 'folder', source | {'prepare.resolution': 64}),
        lambda: prepared(photos, 'w', resolution=64),
    ):
        with pytest.raises(UserError) as e:
            act()
        one_line(e, 'has 0 pictures that can be used', '--set prepare.resolution=32')
    noise(90, (28, 28)).save(photos / 'x.png')
    noise(91, (64, 64)).save(photos / 'large.png')
    assert load_profile('folder', source).prepare.resolution == 64


# ---- splits that stay


def sides(result):  # source -> split
    return {source: row['split'] for source, row in rows(result).items()}


@pytest.mark.parametrize('split', ['content', 'stratified'])
def test_adding_removing_and_renaming_moves_no_picture(photos, split):
    first = sides(prepared(photos, split=split))
    assert set(first.values()) == {'train', 'val', 'test'}
    for i in range(12, 40):
        noise(i).save(photos / ('rose', 'lily')[i % 2] / f'{i}.png')
    held = [f for f, s in first.items() if s != 'train']
    for f in [*held, 'rose/0.png']:  # near copies follow, whatever their own hash says
        with Image.open(photos / f) as im:
            im.resize((44, 52), Image.Resampling.BICUBIC).save(photos / f'{Path(f).stem} near.png')
    os.rename(photos / 'lily' / '1.png', photos / 'rose' / 'aaa.png')
    grown = sides(prepared(photos, split=split))
    assert grown.pop('rose/aaa.png') == first['lily/1.png']
    assert all(grown[f] == s for f, s in first.items() if f != 'lily/1.png')
    assert all(grown[f'{Path(f).stem} near.png'] == first[f] for f in [*held, 'rose/0.png'])
    gone = [f for f in first if (photos / f).exists() and f not in held][:4]
    for f in gone:
        os.unlink(photos / f)
    less = sides(prepared(photos, split=split))
    assert all(less[f] == s for f, s in grown.items() if f in less) and not set(gone) & set(less)


def test_the_hash_alone_decides_in_another_workspace(photos, tmp_path):
    for i in range(12, 90):
        noise(i).save(photos / f'{i}.png')
    a = sides(prepared(photos, val=0.2, test=0.2))
    assert 8 < sum(s == 'val' for s in a.values()) < 30
    for i in range(90, 110):
        noise(i).save(photos / f'{i}.png')
    b = sides(prepared(photos, 'other', val=0.2, test=0.2))
    assert all(b[f] == s for f, s in a.items())
    larger = sides(prepared(photos, 'other', val=0.2, test=0.2, resolution=40, crop='random'))
    assert larger == b  # neither the resolution nor the crop is content


def test_adding_to_an_official_split_moves_no_picture(photos):
    names = [str(f.relative_to(photos)) for f in sorted(photos.rglob('*.png'))]
    says = dict(zip(names, ['train', 'val', 'test'] + ['train'] * 9))
    lines = [dict(file_name=f, official_split=s) for f, s in says.items()]
    write_metadata(photos, *lines)
    first = sides(prepared(photos, split='official'))
    held = next(f for f, s in first.items() if s == 'test')
    with Image.open(photos / held) as im:
        im.resize((44, 52), Image.Resampling.BICUBIC).save(photos / 'near.png')
    write_metadata(photos, *lines, dict(file_name='near.png', official_split='train'))
    grown = sides(prepared(photos, split='official'))
    assert grown == first | {'near.png': 'test'}


def test_every_split_of_a_few_pictures_has_one(tmp_path):
    for n in (3, 5, 9):
        folder = tmp_path / f'few{n}'
        folder.mkdir()
        for i in range(n):
            noise(500 + i).save(folder / f'{i}.png')
        assert all(prepared(folder, f'ws{n}').info['counts'].values())
    (tmp_path / 'alike').mkdir()
    for i in range(5):
        noise(1).point(lambda v, i=i: min(255, v + i)).save(tmp_path / 'alike' / f'{i}.png')
    assert all(prepared(tmp_path / 'alike', 'alike ws').info['counts'].values())


# ---- captions


def test_folder_without_captions_or_labels(tmp_path):
    (tmp_path / 'IMG').mkdir()
    for i in range(5):
        noise(i).save(tmp_path / 'IMG' / f'{i}.png')
    prepared(tmp_path / 'IMG')
    out = caption.run(tmp_path / 'ws', overrides={'caption.accept': 'same_captions'})
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
    out = caption.run(photos.parent / 'ws', overrides={'caption.class_captions': 0})
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
    seen = set().union(*map(background_combinations, train))
    held = {tuple(x) for x in a.info['held_out']}
    assert (
        len(train) == 180
        and not seen & held
        and sum(not held.isdisjoint(background_combinations(r)) for r in val) == len(val) // 2 > 0
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
