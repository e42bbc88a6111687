# ruff: noqa: F811 (fixtures)
"""Uploads and downloads with the real boto3: every fault is one line, and the same command resumes.
Amazon's own S3 is never used, only moto's server behind a proxy that injects faults."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from s3_proxy import Proxy, certificate, error, other_store
from test_store import bucket, endpoint, folder, tree  # noqa: F401 (fixtures among them)

from flowerdiff.core.errors import UserError
from flowerdiff.core.manifest import describe_files
from flowerdiff.core.workspace import open_workspace
from flowerdiff.services import s3 as B
from flowerdiff.services import store as S

MiB = 1 << 20


@pytest.fixture
def line(bucket, endpoint, monkeypatch):
    "A store behind a proxy that does as it is told; few tries, so that faults come through."
    proxy = Proxy(endpoint)
    monkeypatch.setenv('AWS_ENDPOINT_URL', proxy.url)
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '2')
    proxy.new = lambda: S.open_store(f's3://{bucket}/set')
    proxy.store = functools.cache(proxy.new)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def told(f, *args, **kwargs):
    with pytest.raises(UserError) as e:
        f(*args, **kwargs)
    assert '\n' not in str(e.value) and 's3://' in str(e.value), e.value
    return str(e.value)


# ---- faults on the way up

FAULTS = [  # what S3 answers to an upload, what a person reads
    (error('ExpiredToken'), 'credentials have expired; sign in'),
    (error('InvalidToken'), 'credentials have expired; sign in'),
    (error('InvalidAccessKeyId', 403), 'check AWS_ACCESS_KEY_ID'),
    (error('SignatureDoesNotMatch', 403), 'check AWS_SECRET_ACCESS_KEY'),
    (error('AccessDenied', 403), "another account's bucket, or the credentials lack s3:ListBucket"),
    (
        error('AccessDenied', 403, Message='ada is not authorized to perform: kms:GenerateDataKey'),
        'access denied (ada is not authorized to perform: kms:GenerateDataKey); the credentials may not use',
    ),
    (
        error('AccessDenied', 403, Message='ada may not, with an explicit deny in a policy'),
        'with an explicit deny in a policy); a policy forbids it, perhaps because it demands an MFA code',
    ),
    (
        error('KMS.DisabledException', 400),
        'KMS.DisabledException it is); the credentials may not use the KMS',
    ),
    (error('QuotaExceeded', 403), 'the quota is full; make room'),
    (error('XMinioStorageFull', 507), 'the quota is full; make room'),
    (error('SlowDown', 503), 'asks to slow down; run again later'),
    (error('InternalError', 500), 'has an internal error; run again later'),
    (error('RequestTimeTooSkewed', 403), 'the clock of this machine is wrong'),
    (error('BadDigest'), 'checksum differs'),
    (error('PermanentRedirect', 301), 'another region; set AWS_DEFAULT_REGION'),
    ((200, {'Content-Type': 'text/html'}, b'<html><p>Welcome<br></html>'), 'does not answer as S3 does'),
    (
        (404, {'Content-Type': 'text/html'}, b'<html><p>Not here<br></html>'),
        'does not answer as S3 does (HTTP 404)',
    ),
    ('cut', 'it resumes where it stopped'),
]


@pytest.mark.parametrize(
    'fault,says', FAULTS, ids=[f[0] if isinstance(f[0], str) else f[1][-24:] for f in FAULTS]
)
def test_a_fault_midway_is_one_line_and_is_gone_on_from(fault, says, line, folder):
    """After sixteen lists and four objects, so that some have arrived; the next try sends only the rest.
    Nobody saw a manifest meanwhile."""
    if not (html := isinstance(fault, tuple) and b'html' in fault[2]):
        line.fault = lambda method, path, n: fault if n > 20 and '/objects/' in path else None
    else:
        line.fault = lambda method, path, n: fault
    assert says in told(S.push, folder, line.store())
    line.fault = None
    there = len(line.store().sizes())
    assert line.store().read('manifest.json') is None and there < 33 and (there > 0 or html)
    assert S.push(folder, line.store())['sent'] == 33 - there and S.read_manifest(line.store())['count'] == 33


@pytest.mark.parametrize(
    'fault', [error('SlowDown', 503), error('InternalError', 500), 'cut'], ids=['slow', 'internal', 'cut']
)
def test_what_passes_is_tried_again(fault, line, folder):
    "Each request fails the first time."
    seen = set()

    def once(method, path, n):
        if '/objects/' in path and (method, path) not in seen:
            seen.add((method, path))
            return fault

    line.fault = once
    for f in sorted(folder.rglob('*.bin'))[3:]:
        f.unlink()
    assert S.push(folder, line.store())['sent'] == 6 and len(seen) == 6
    assert S.read_manifest(line.store())['count'] == 6


def test_a_bucket_elsewhere_is_found_or_told_of(line, folder):
    "boto3 follows when S3 names the region; when it does not, there is a line."
    wrong = error('AuthorizationHeaderMalformed', Region='eu-central-1')
    line.fault = lambda method, path, n: (
        (400, {**wrong[1], 'x-amz-bucket-region': 'eu-central-1'}, wrong[2]) if n == 1 else None
    )
    assert S.push(folder, line.store())['sent'] == 33
    line.fault = lambda method, path, n: (
        error('AuthorizationHeaderMalformed') if method != 'HEAD' else (400, {}, b'')
    )
    assert 'AWS_DEFAULT_REGION' in told(S.push, folder, line.new())


@pytest.mark.parametrize(
    'url,says', [('s3://no spaces', 'is not a bucket name'), ('s3:///there', 'has no bucket')]
)
def test_names_that_are_none(url, says, bucket, folder):
    assert says in told(lambda: S.push(folder, S.open_store(url)))


def test_an_endpoint_that_is_no_address(bucket, folder, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'nonsense')
    assert 'AWS_ENDPOINT_URL wants an address' in told(lambda: S.push(folder, S.open_store(f's3://{bucket}')))


# ---- big files


def big(folder, *mb):
    folder.mkdir(exist_ok=True)
    for i, n in enumerate(mb):
        (folder / f'{i}.bin').write_bytes(os.urandom(MiB) * n)
    return folder


def left_parts(bucket):
    import boto3

    return boto3.client('s3').list_multipart_uploads(Bucket=bucket).get('Uploads', [])


@pytest.mark.parametrize(
    'fault', ['cut', error('ExpiredToken'), error('SlowDown', 503)], ids=['cut', 'expired', 'slow']
)
def test_a_big_file_that_fails_leaves_no_parts(fault, line, bucket, tmp_path):
    line.fault = lambda method, path, n: fault if 'partNumber=3' in path else None
    told(S.push, big(tmp_path / 'set', 40), line.store())
    assert line.count('partNumber=1') and not left_parts(bucket) and not line.store().sizes()
    line.fault = None
    assert S.push(tmp_path / 'set', line.store())['sent'] == 1


def test_a_file_that_changes_meanwhile_is_not_published(line, bucket, tmp_path):
    "Before its parts become an object the file is looked at again: nothing has to be deleted afterwards."
    root = big(tmp_path / 'set', 20)

    def edit(method, path, n):
        if 'partNumber=2' in path:
            with open(root / '0.bin', 'r+b') as f:
                f.write(b'edited')

    line.fault = edit
    with pytest.raises(UserError, match='changed while it was sent'):
        S.push(root, line.store())
    assert (
        not line.store().sizes()
        and not left_parts(bucket)
        and all('uploadId=' in s for s in line.seen if s.startswith('DELETE'))
    )


def test_the_bar_moves_while_nothing_has_arrived(line, tmp_path):
    "Three shards of 8 MB over a slow line: megabytes go by before the first object is there."
    root, ticks = big(tmp_path / 'set', 7, 7, 7), []
    for i in range(3):
        with open(root / f'{i}.bin', 'ab') as f:
            f.write(bytes([i]))

    def arrived():
        return sum(request.startswith('PUT') for request in line.done)

    line.pause = 0.005

    def bar(iterable, total, label):
        for t in iterable:
            ticks.append((t, total, label, arrived())) if 'MB' in label else None
            yield t

    S.push(root, line.store(), progress=bar)
    assert [t[:3] for t in ticks] == [(i, 23, 'MB sent') for i in range(1, 23)] and ticks[5][3] == 0


@pytest.mark.parametrize('way', ['up', 'down'])
def test_ctrl_c_leaves_promptly(way, line, bucket, tmp_path, monkeypatch):
    "In a process of its own, over a line that would take minutes, with as many tries as there usually are."
    monkeypatch.delenv('AWS_MAX_ATTEMPTS')
    root = big(tmp_path / 'set', 24, 5)
    if way == 'down':
        S.push(root, line.store())
    line.pause, line.seen = 0.1, []
    call = f'S.push({str(root)!r}, place)' if way == 'up' else f'S.pull(place, {str(tmp_path / "back")!r})'
    p = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import signal\n'
            'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
            'from flowerdiff.services import store as S\n'
            f'place = S.open_store("s3://{bucket}/set")\n{call}',
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    sought, end = 'partNumber=2' if way == 'up' else 'GET /' + bucket + '/set/objects/', time.time() + 60
    while not line.count(sought):
        assert p.poll() is None and time.time() < end
        time.sleep(0.05)
    time.sleep(0.5)
    p.send_signal(signal.SIGINT)
    start = time.time()
    said = p.communicate(timeout=30)[1]
    assert time.time() - start < 5 and 'KeyboardInterrupt' in said and p.returncode
    line.pause = 0.0
    if way == 'up':
        assert not left_parts(bucket) and line.store().read('manifest.json') is None
    else:
        assert not [f for f in (tmp_path / 'back').rglob('*') if '.download' not in f.parts and f.is_file()]


def test_memory_does_not_grow_with_the_file(endpoint, bucket, tmp_path):
    code = """
import sys
from flowerdiff.services import store as S
S.push(sys.argv[1], S.open_store(sys.argv[2]))
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""
    peak = {}
    for n in (10, 200):
        peak[n] = (
            int(
                subprocess.run(
                    [sys.executable, '-c', code, big(tmp_path / str(n), n), f's3://{bucket}/{n}'],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            / 1024
        )
    assert peak[200] < peak[10] + 40, peak  # MB


# ---- what is asked of AWS


def test_the_policy_is_what_is_used(line, folder, tmp_path):
    """Every operation that boto3 sends up and down, a failed big file included, has its action in the
    policy, and the policy has no other."""
    NEEDS = dict(
        ListObjectsV2='s3:ListBucket',
        HeadBucket='s3:ListBucket',
        GetObject='s3:GetObject',
        HeadObject='s3:GetObject',
        PutObject='s3:PutObject',
        CreateMultipartUpload='s3:PutObject',
        UploadPart='s3:PutObject',
        CompleteMultipartUpload='s3:PutObject',
        AbortMultipartUpload='s3:AbortMultipartUpload',
    )  # AWS's "Actions, resources and condition keys for Amazon S3"
    used, place = set(), line.store()
    place.s3.meta.events.register('before-call.s3', lambda model, **_: used.add(model.name))
    big(folder, 20)
    line.fault = lambda method, path, n: error('AccessDenied', 403) if 'partNumber=2' in path else None
    told(S.push, folder, place)
    line.fault = None
    S.push(folder, place)
    S.push(folder, place)
    S.pull(place, tmp_path / 'back')
    policy = B.policy(place.url)
    assert {NEEDS[u] for u in used} == {a for s in policy['Statement'] for a in s['Action']}
    bucket_arn = f'arn:aws:s3:::{place.bucket}'
    assert [s['Resource'] for s in policy['Statement']] == [bucket_arn, f'{bucket_arn}/set/*']
    assert all(f'/{place.bucket}?' in s or f'/{place.bucket}/set/' in s for s in line.seen)


# ---- stores that are not Amazon's


@pytest.fixture
def other(bucket, endpoint, tmp_path, monkeypatch):
    "A store behind https, where boto3 sends checksums behind the data if it may."
    pem = certificate(tmp_path)
    proxy = Proxy(endpoint, pem)
    for name, value in dict(ENDPOINT_URL=proxy.url, CA_BUNDLE=str(pem), MAX_ATTEMPTS='1').items():
        monkeypatch.setenv(f'AWS_{name}', value)
    proxy.new = lambda: S.open_store(f's3://{bucket}/set')
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.parametrize('kind,says', [('r2', 'is not implemented'), ('gcs', 'signature not accepted')])
def test_a_store_that_knows_no_checksums(kind, says, other, folder, tmp_path, monkeypatch):
    "Large files and small ones arrive; with the requests that Amazon gets, they would be refused."
    other.refuse = other_store(kind)
    big(folder, 20)
    assert S.push(folder, other.new())['sent'] == 34
    S.pull(other.new(), tmp_path / 'back')
    assert tree(tmp_path / 'back') == tree(folder)
    (folder / '0.bin').write_bytes(os.urandom(20 * MiB))
    monkeypatch.setattr(B, 'is_amazon', lambda *_: True)
    assert says in told(S.push, folder, other.new())


@pytest.mark.parametrize('mb', [0, 20])
def test_bytes_that_change_on_the_way_are_refused_without_checksums(mb, other, tmp_path):
    "The hash is part of the signature."
    other.refuse = other_store('r2')
    other.damage = lambda body: body[:-1] + b'?' if len(body) > 1000 and b'<' not in body[:1] else body
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/a').write_bytes(bytes(2000 + mb * MiB))
    assert 'checksum differs' in told(S.push, tmp_path / 'set', other.new())
    assert other.new().sizes() == {} and other.new().read('manifest.json') is None


# ---- faults on the way down


def test_one_request_an_object(line, folder, tmp_path):
    S.push(folder, line.store())
    line.seen.clear()
    S.pull(line.store(), tmp_path / 'back')
    assert len(line.seen) == 34 and not line.count('HEAD')


def test_a_missing_and_a_damaged_object(line, folder, tmp_path):
    files = S.push(folder, line.store())['files']
    place = line.store()
    key = S.object_key(files[4]['sha256'])
    place.write(key, b'x' * files[4]['size'])
    said = told(S.pull, place, tmp_path / 'back')
    assert 'damaged' in said and files[4]['path'] in said
    place.s3.delete_object(**place._at(key))
    assert 'is missing; send the set again' in told(S.pull, place, tmp_path / 'back')
    assert tree(tmp_path / 'back').keys() == {
        k for k in tree(tmp_path / 'back') if k.startswith('.download/')
    }  # nothing is in place yet
    assert S.push(folder, place)['sent'] == 1
    line.seen.clear()
    S.pull(place, tmp_path / 'back')
    assert (
        tree(tmp_path / 'back') == tree(folder) and line.count('/objects/') < 33
    )  # what had come was not fetched again


def test_a_line_that_breaks_on_the_way_down(line, folder, tmp_path):
    (
        folder / 'captions/empty'
    ).unlink()  # S3 answers with an error to who asks for a range of nothing, and boto3 knows
    S.push(folder, line.store())
    seen = set()

    def once(method, path, n):
        if '/objects/' in path and path not in seen:
            seen.add(path)
            return ('half',)

    line.fault = once
    S.pull(line.store(), tmp_path / 'back')
    assert tree(tmp_path / 'back') == tree(folder) and len(seen) == 32
    line.fault = lambda method, path, n: ('half',) if '/objects/' in path else None
    assert 'it resumes where it stopped' in told(S.pull, line.store(), tmp_path / 'other')


def test_a_full_disk_on_the_way_down(line, tmp_path):
    if os.getuid():
        pytest.skip('mounting a small disk wants root')
    from flowerdiff.core.errors import disk_errors

    S.push(big(tmp_path / 'set', 3, 12), line.store())
    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'none', small], capture_output=True
    ).returncode:
        pytest.skip('no disk can be mounted here')
    try:
        with pytest.raises(UserError, match='the disk is full; make room'), disk_errors():
            S.pull(line.store(), small)
        subprocess.run(['mount', '-o', 'remount,size=40m', small], check=True)
        S.pull(line.store(), small)
        assert tree(small) == tree(tmp_path / 'set')
    finally:
        subprocess.run(['umount', '-l', small])


def test_a_manifest_from_elsewhere(tmp_path):
    "What a store says is not believed: a hash that is a path, a list that is none."
    place = S.LocalStore(tmp_path / 'store')
    for data, says in (
        (b'<html>', 'damaged, or not'),
        (b'[1]', 'damaged, or not'),
        (json.dumps(dict(files=[dict(path='a', size=1, sha256='../../a')])).encode(), 'damaged, or not'),
    ):
        place.write('manifest.json', data)
        with pytest.raises(UserError, match=says):
            S.pull(place, tmp_path / 'back')


ENTRY = dict(path='a', size=1, sha256='0' * 64)
HOSTILE = {
    'NUL': [dict(ENTRY, path='a\0b')],
    'line': [dict(ENTRY, path='a\nb')],
    'surrogate': [dict(ENTRY, path='a\ud83d')],
    'file and folder': [ENTRY, dict(ENTRY, path='a/b')],
    'file and folder, by case': [dict(ENTRY, path='A'), dict(ENTRY, path='a/b')],
    'long': [dict(ENTRY, path='a' * 300)],
    'deep': [dict(ENTRY, path='a/' * 600 + 'a')],
    'absolute': [dict(ENTRY, path='/tmp/a')],
    'up': [dict(ENTRY, path='a/../../b')],
    'empty': [dict(ENTRY, path='')],
    'hidden': [dict(ENTRY, path='.git/hooks/post-commit')],
    'not plain': [dict(ENTRY, path='./a')],
    'twice': [ENTRY, ENTRY],
    'by case': [ENTRY, dict(ENTRY, path='A')],
    'by accent': [dict(ENTRY, path='\u00fc'), dict(ENTRY, path='u\u0308')],
    'path is a number': [dict(ENTRY, path=7)],
    'size is a text': [dict(ENTRY, size='1')],
    'size is true': [dict(ENTRY, size=True)],
    'size is negative': [dict(ENTRY, size=-1)],
    'size is huge': [dict(ENTRY, size=10**30)],
    'hash is a list': [dict(ENTRY, sha256=['0'])],
    'an entry is a text': ['a'],
    'files is none': None,
}


@pytest.mark.parametrize('name', HOSTILE)
def test_nothing_is_taken_in_from_a_hostile_manifest(name, tmp_path):
    "One line, before anything is made, even where a good file stands first."
    store, files = S.LocalStore(tmp_path / 'store'), HOSTILE[name]
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/good').write_text('good')
    good = S.push(tmp_path / 'set', store)['files']
    try:
        data = describe_files(good + files)
    except TypeError:  # sizes that cannot be added up
        data = dict(files=files if files is None else good + files)
    store.write('manifest.json', json.dumps(data).encode())
    with pytest.raises(UserError) as e:
        S.pull(store, tmp_path / 'back')
    assert '\n' not in str(e.value) and '\0' not in str(e.value) and len(str(e.value)) < 500
    assert str(e.value).encode() and not (tmp_path / 'back').exists()


@pytest.mark.parametrize('changes', [dict(bytes=2), dict(count='2'), dict(revision='0' * 64), dict(format=2)])
def test_a_manifest_that_contradicts_itself(changes, tmp_path):
    store = S.LocalStore(tmp_path / 'store')
    store.write('manifest.json', json.dumps(describe_files([ENTRY]) | changes).encode())
    with pytest.raises(UserError, match='damaged, or not'):
        S.read_manifest(store)
    store.write('manifest.json', b'[' * 100_000)
    with pytest.raises(UserError, match='damaged, or not'):
        S.read_manifest(store)


@pytest.mark.parametrize('size', [3, 5, 10**15])
def test_a_false_size_is_found(size, tmp_path):
    "Too small: it stops before the rest arrives. Too large: it would be fetched again each time."
    store, data = S.LocalStore(tmp_path / 'store'), b'rose'
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/a').write_bytes(data)
    files = S.push(tmp_path / 'set', store)['files']
    store.write('manifest.json', json.dumps(describe_files([dict(files[0], size=size)])).encode())
    with pytest.raises(UserError, match='checksum or size differs'):
        S.pull(store, tmp_path / 'back')
    assert not (tmp_path / 'back/a').exists()


def test_names_that_a_download_would_refuse_are_not_sent(tmp_path):
    (tmp_path / 'set').mkdir()
    for name in ('Rose.png', 'rose.png'):
        (tmp_path / 'set' / name).write_text(name)
    with pytest.raises(UserError, match='one file on some disks'):
        S.push(tmp_path / 'set', S.LocalStore(tmp_path / 'store'))
    assert not (tmp_path / 'store').exists()


def test_same_bytes_twice_and_a_stop_between(tmp_path, monkeypatch):
    "Two files of one content travel once; a kill while they are moved into place loses nothing."
    (tmp_path / 'set/deep').mkdir(parents=True)
    place = S.LocalStore(tmp_path / 'store')
    for n in ('a', 'b', 'deep/c'):
        (tmp_path / 'set' / n).write_text('the same')
    (tmp_path / 'set/d').write_text('another')
    assert S.push(tmp_path / 'set', place)['sent'] == 2
    moves, replace = [], os.replace

    def flaky(a, b):
        if '.download' not in Path(b).parts:
            moves.append(b)
        if len(moves) == 2:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as m:
        m.setattr(S.os, 'replace', flaky)
        with pytest.raises(KeyboardInterrupt):
            S.pull(place, tmp_path / 'back')
    monkeypatch.setattr(place, 'get', lambda *a: pytest.fail('travelled twice'))
    S.pull(place, tmp_path / 'back')
    assert {k: v for k, v in tree(tmp_path / 'back').items() if '/.' not in f'/{k}'} == tree(tmp_path / 'set')


# ---- nothing changed


@pytest.mark.parametrize('kind', ['folder', 's3'])
def test_nothing_changed_reads_nothing(kind, tmp_path, request):
    """With remembered hashes no file is opened and no object sent; a file that changed and took back its
    size and date is."""
    place = (
        S.LocalStore(tmp_path / 'store')
        if kind == 'folder'
        else S.open_store(f's3://{request.getfixturevalue("bucket")}')
    )
    root = tmp_path / 'set'
    root.mkdir()
    for i in range(50):
        (root / f'{i}').write_bytes(bytes([i]) * 100)

    def push():
        with S.HashCache(root, tmp_path / 'work' / 'hashes.json') as h:
            h.now += 2 * S.REST
            return h, S.push(root, place, hashed=h)['sent']

    def counts():
        h, sent = push()
        return h.read, sent

    assert [counts(), counts()] == [(50, 50), (0, 0)]
    was = (root / '7').stat()
    (root / '7').write_bytes(b'x' * 100)
    os.utime(root / '7', ns=(was.st_atime_ns, was.st_mtime_ns))
    assert counts() == (1, 1)
    for spoil in (b'', b'{"files": 3}', b'\xff\xfe', (tmp_path / 'work/hashes.json').read_bytes()[:-40]):
        (tmp_path / 'work/hashes.json').write_bytes(spoil)
        assert counts() == (50, 0)
    (root / '8').unlink()
    assert counts() == (0, 0) and '8' not in json.loads((tmp_path / 'work/hashes.json').read_text())['files']


def test_a_file_written_a_moment_ago_is_not_trusted(tmp_path):
    "Two writes within a tick of the clock show the same size and times; only files at rest are remembered."
    root = tmp_path / 'set'
    root.mkdir()
    (root / 'a').write_text('1')
    with S.HashCache(root, tmp_path / 'h.json') as h:
        assert h(root / 'a') and not h.kept
    with S.HashCache(root, tmp_path / 'h.json') as h:
        h(root / 'a')
        assert h.read == 1


# ---- the journey of a set


def test_from_one_machine_to_another(cli, bucket, tiny_workspace, tmp_path, monkeypatch):
    """A run sends its data to a bucket; elsewhere the same model is trained from it, byte for byte, though
    the first machine is gone (the stages after it are tests of their own). A workspace that is there
    keeps its settings and what the set does not name."""

    def run(*args, says=None, code=0):
        p = cli(*args, cwd=tmp_path)
        assert p.returncode == code and 'Traceback' not in p.stderr, p.stdout + p.stderr
        assert not says or says in p.stdout + p.stderr, p.stdout + p.stderr
        return p.stdout

    home, url = tmp_path / 'home', f's3://{bucket}/meadow'
    assert 'holds no set' in cli('download', url, cwd=tmp_path).stderr and not (tmp_path / 'meadow').exists()
    shutil.copytree(tiny_workspace, home)
    run('run', home, '--only', 'upload', '--set', f'upload.destination={url}', says='files were new')
    run('download', url, says='each checked; next: flowerdiff run meadow --from train')

    def data(root):
        parts = ('pictures', 'captions', 'encoded', 'params.yaml')
        return {path: sha for path, sha in tree(root).items() if path.split('/')[0] in parts}

    assert data(tmp_path / 'meadow') == data(home)
    shutil.rmtree(home)
    run('run', 'meadow', '--only', 'train')
    weights = 'candidate/unet/diffusion_pytorch_model.safetensors'
    assert (tmp_path / 'meadow' / weights).read_bytes() == (tiny_workspace / weights).read_bytes()
    open_workspace(tmp_path / 'meadow', overrides={'train.lr': 0.0123})
    # the set again: a spoiled picture is mended, a person's settings and files stay
    picture = next((tmp_path / 'meadow/pictures/train').glob('*.png'))
    was = picture.read_bytes()
    picture.write_bytes(b'spoiled')
    (tmp_path / 'meadow/pictures/mine.txt').write_text('mine')
    run('download', url, 'meadow', says='1 of ')
    assert (
        picture.read_bytes() == was
        and (tmp_path / 'meadow/pictures/mine.txt').exists()
        and '0.0123' in (tmp_path / 'meadow/params.yaml').read_text()
    )
    run('download', url, 'meadow', says='files were there, each checked; its params.yaml stays')
    run('download', url, 'meadow', '--only', 'model', code=2, says='invalid choice')


def test_only_data_is_taken_from_a_store(tmp_path):
    "A manifest that names the pipeline's own files, whose commands would be run, does not get them in."
    from flowerdiff.core.profiles import profiles
    from flowerdiff.pipeline.download import download

    root = tmp_path / 'set'
    (root / 'pictures').mkdir(parents=True)
    shutil.copy(profiles()['garden'], root / 'params.yaml')
    (root / 'dvc.yaml').write_text('stages: {}')
    (root / 'pictures/a.png').write_bytes(b'a')
    S.push(root, S.LocalStore(tmp_path / 'store'))
    got = download(tmp_path / 'store', tmp_path / 'meadow')
    assert (
        got['fetched'] == 1
        and not (tmp_path / 'meadow/dvc.yaml').exists()
        and (tmp_path / 'meadow/params.yaml').exists()
    )
    (root / 'params.yaml').unlink()
    S.push(root, S.LocalStore(tmp_path / 'store'))
    with pytest.raises(UserError, match=r'has no params\.yaml'):
        download(tmp_path / 'store', tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_a_download_under_a_run_waits_its_turn(tmp_path):
    from flowerdiff.core.profiles import profiles
    from flowerdiff.pipeline.download import download
    from flowerdiff.services.processes import lock

    root = tmp_path / 'set'
    (root / 'pictures').mkdir(parents=True)
    (root / 'pictures/a.png').write_bytes(b'a')
    shutil.copy(profiles()['garden'], root / 'params.yaml')
    S.push(root, S.LocalStore(tmp_path / 'store'))
    ws = open_workspace(tmp_path / 'meadow')
    with lock(ws), pytest.raises(UserError, match='another flowerdiff run works here'):
        download(tmp_path / 'store', ws.root)
    assert not ws.pictures.exists()


def test_what_the_run_shows_of_a_slow_line(line, tmp_path, monkeypatch):
    "`flowerdiff run`'s line, while two big shards are on their way."
    from flowerdiff.pipeline.progress import how_far
    from flowerdiff.stages.upload import send

    ws, lines = open_workspace(tmp_path / 'meadow'), []
    for part in ('pictures', 'captions', 'encoded'):
        (ws.root / part).mkdir()
    big(ws.encoded, 7, 6)
    (ws.root / '.flowerdiff').mkdir()
    monkeypatch.setenv('FLOWERDIFF_PROGRESS', str(ws.root / '.flowerdiff/progress.json'))
    line.pause = 0.02
    sender = threading.Thread(target=send, args=(ws, line.store()))
    sender.start()
    while sender.is_alive():
        time.sleep(0.1)
        lines.append(str(how_far(ws, 'upload', 0)))
    moving = {line for line in lines if re.fullmatch(r'MB sent \d+/14, \d+/s, [\d.]+ s left', line)}
    assert len(moving) >= 2, lines
