"The store: a folder and a bucket (moto's server on this machine) hold the same set, exactly."

import json
import os
import uuid

import pytest

from flowerdiff.core.errors import UserError
from flowerdiff.core.fingerprints import file_sha256
from flowerdiff.services import store as S

FAKE = dict(AWS_ACCESS_KEY_ID='testing', AWS_SECRET_ACCESS_KEY='testing', AWS_DEFAULT_REGION='us-east-1')


@pytest.fixture(scope='module')
def endpoint():
    moto = pytest.importorskip(
        'moto.moto_server.threaded_moto_server', reason="moto is not installed: pip install 'moto[server]'"
    )
    server = moto.ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f'http://{host}:{port}'
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    for k in list(os.environ):
        if k.startswith('AWS_'):
            monkeypatch.delenv(k)
    for k, v in dict(FAKE, AWS_ENDPOINT_URL=endpoint).items():
        monkeypatch.setenv(k, v)
    import boto3

    name = f'b-{uuid.uuid4().hex}'
    boto3.client('s3').create_bucket(Bucket=name)
    return name


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'set'
    for i in range(30):
        (root / f'encoded/{i % 3}').mkdir(parents=True, exist_ok=True)
        (root / f'encoded/{i % 3}/{i}.bin').write_bytes(bytes([i]) * (100 + i))
    (root / 'captions').mkdir()
    (root / 'captions/metadata.jsonl').write_text('{"a": "ünicode"}\n')
    (root / 'captions/näme with space.txt').write_text('x')
    (root / 'captions/empty').touch()
    return root


def tree(root):
    return {str(p.relative_to(root)): file_sha256(p) for p in root.rglob('*') if p.is_file()}


@pytest.fixture(params=['folder', 's3'])
def place(request, tmp_path):
    if request.param == 'folder':
        return S.open_store('store', tmp_path)
    return S.open_store(f's3://{request.getfixturevalue("bucket")}/some/prefix')


def test_roundtrip_and_only_what_changed_travels(place, folder, tmp_path):
    assert S.push(folder, place)['sent'] == 33
    again = S.push(folder, place)
    assert again['sent'] == 0 and again['sent_bytes'] == 0
    (folder / 'encoded/0/0.bin').write_bytes(b'new')
    assert S.push(folder, place)['sent'] == 1
    S.pull(place, tmp_path / 'back')
    assert tree(tmp_path / 'back') == tree(folder)
    assert S.pull(place, tmp_path / 'back')['fetched'] == 0
    (tmp_path / 'back/encoded/1/1.bin').write_bytes(b'spoiled')
    assert S.pull(place, tmp_path / 'back')['fetched'] == 1 and tree(tmp_path / 'back') == tree(folder)


def test_manifest_is_written_last_and_not_at_all_after_a_failure(place, folder, monkeypatch):
    old = S.push(folder, place, ['captions'])['revision']
    order, put, write = [], place.put, place.write

    def flaky(file, key, sha, moved):
        order.append('put')
        if len(order) == 7:
            raise UserError('the line broke')
        put(file, key, sha, moved)

    monkeypatch.setattr(place, 'put', flaky)
    monkeypatch.setattr(place, 'write', lambda k, d: (order.append(k), write(k, d)))
    with pytest.raises(UserError, match='the line broke'):
        S.push(folder, place)
    assert S.read_manifest(place)['revision'] == old and 'manifest.json' not in order
    monkeypatch.setattr(place, 'put', lambda *a: (order.append('put'), put(*a)))
    rest = S.push(folder, place)
    assert 0 < rest['sent'] < 30 and order[-1] == 'manifest.json'  # goes on where it stopped


def test_damage_is_found_on_the_way_back(place, folder, tmp_path):
    files = S.push(folder, place)['files']
    big = next(f for f in files if f['path'].endswith('5.bin'))
    place.write(S.object_key(big['sha256']), b'x' * big['size'])
    with pytest.raises(UserError, match='damaged'):
        S.pull(place, tmp_path / 'back')
    assert not (tmp_path / 'back' / big['path']).exists() and not [
        f for f in (tmp_path / 'back').rglob('*') if f.is_file() and '.download' not in f.parts
    ]


def test_a_big_file_goes_in_parts(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr('flowerdiff.services.s3.is_amazon', lambda *_: True)  # not moto's server
    place = S.open_store(f's3://{bucket}')
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/big.bin').write_bytes(os.urandom(1 << 20) * 20)
    calls = []
    place.s3.meta.events.register(
        'before-send.s3',
        lambda request, event_name, **kw: calls.append(
            (event_name.split('.')[-1], {k.lower(): v for k, v in request.headers.items()})
        ),
    )
    S.push(tmp_path / 'set', place)
    assert [c for c, _ in calls].count('UploadPart') == 3
    assert all(
        'x-amz-checksum-sha256' in h or b'sha256' in bytes(h.get('x-amz-trailer', b''))
        for c, h in calls
        if c == 'UploadPart'
    )
    S.pull(place, tmp_path / 'back')
    assert tree(tmp_path / 'back') == tree(tmp_path / 'set')
    assert S.push(tmp_path / 'set', place)['sent'] == 0


def test_small_objects_carry_their_checksum(bucket, folder, monkeypatch):
    monkeypatch.setattr('flowerdiff.services.s3.is_amazon', lambda *_: True)  # not moto's server
    place, seen = S.open_store(f's3://{bucket}'), []
    place.s3.meta.events.register(
        'before-call.s3.PutObject',
        lambda params, **kw: seen.append(params['headers'].get('x-amz-checksum-sha256')),
    )
    S.push(folder, place)
    assert len([s for s in seen if s]) == 33


def test_a_refused_path_and_an_empty_place(tmp_path):
    place = S.LocalStore(tmp_path / 'store')
    with pytest.raises(UserError, match='holds no set'):
        S.pull(place, tmp_path / 'back')
    for bad in ('../../etc/passwd', '/etc/passwd'):
        place.write(
            'manifest.json', json.dumps(dict(files=[dict(path=bad, size=1, sha256='0' * 64)])).encode()
        )
        with pytest.raises(UserError, match='outside'):
            S.pull(place, tmp_path / 'back')


def test_errors_are_one_line(bucket, folder, monkeypatch):
    def line(url, **env):
        for k, v in env.items():
            monkeypatch.setenv(k, v)
        with pytest.raises(UserError) as e:
            S.push(folder, S.open_store(url))
        assert '\n' not in str(e.value) and url in str(e.value)
        return str(e.value)

    assert 'no such bucket' in line('s3://nobody-made-this-one')
    assert 'no answer from http://127.0.0.1:9' in line(
        f's3://{bucket}', AWS_ENDPOINT_URL='http://127.0.0.1:9', AWS_MAX_ATTEMPTS='2'
    )
    for k in FAKE:
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', '/nowhere')
    monkeypatch.setenv('AWS_CONFIG_FILE', '/nowhere')
    message = line(f's3://{bucket}')
    assert 'no AWS credentials' in message and 'AWS_ACCESS_KEY_ID' in message


def test_the_store_does_not_change_with_its_source(folder, tmp_path):
    place = S.LocalStore(tmp_path / 'store')
    S.push(folder, place)
    before = tree(tmp_path / 'store')
    with open(folder / 'encoded/0/0.bin', 'r+b') as f:
        f.write(b'edited in place')
    assert tree(tmp_path / 'store') == before
