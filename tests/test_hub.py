"""The stage publishes to the Hub: the real client, in its own process, with tests/hub_server.py. Each test
names the change that breaks it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flowerdiff.core.files import write_json
from flowerdiff.core.workspace import open_workspace, write_jsonl

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import Hub
from tiny import tiny_model

TOKENS = dict(
    hf_writer=dict(user='someone', write=True),
    hf_reader=dict(user='someone', write=[]),
    hf_one=dict(user='someone', write=['someone/given']),
    hf_other=dict(user='other', write=True),
)

WORKER = """
import json
import os
import sys
import time
import types

say = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)  # what libraries print goes elsewhere
from huggingface_hub.utils import _http

waits = []
_http.time = types.SimpleNamespace(sleep=waits.append)  # the client's waits are recorded, not waited
from flowerdiff.stages.publish import run


def publish(root, overrides):
    return run(root, overrides=overrides).__dict__


def same(repo, model):  # opened in three ways, the repository draws what the model in the workspace draws
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from flowerdiff.inference.generator import Generator

    def draw(where, **options):
        pipe = DiffusionPipeline.from_pretrained(where, safety_checker=None, **options)
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        size = dict(height=32, width=32)
        return np.array(pipe('a red rose', num_inference_steps=2, **size, generator=rng).images[0])

    def ours(where):
        generate = Generator.from_pretrained(where, 'torch')
        return np.array(generate('a red rose', num_inference_steps=2, seed=3)[0])

    name, _, commit = repo.partition('@')
    expected = draw(model)
    return [
        bool((draw(name) == expected).all()),
        bool((draw(name, revision=commit) == expected).all()),
        bool((ours(repo) == ours(model)).all()),
    ]


def snapshot(repo, **options):
    from huggingface_hub import snapshot_download

    return snapshot_download(repo, **options)


def space(repo, text):  # as a Space is published
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    api = HfApi()
    url = str(api.create_repo(repo, repo_type='space', space_sdk='docker', private=True))
    files = [CommitOperationAdd('README.md', text.encode()), CommitOperationAdd('app/a.py', b'print(1)')]
    parent = api.space_info(repo).sha
    commit = api.create_commit(
        repo, files, repo_type='space', commit_message='a Space', parent_commit=parent
    )
    path = hf_hub_download(repo, 'app/a.py', repo_type='space', revision=commit.oid)
    tree = sorted(file.path for file in api.list_repo_tree(repo, repo_type='space'))
    return [url, open(path).read(), api.space_info(repo).sdk, tree]


for line in sys.stdin:
    what, how, token = json.loads(line)
    waits.clear()
    os.environ.pop('HF_TOKEN', None)
    if token:
        os.environ['HF_TOKEN'] = token
    try:
        back = dict(value=globals()[what](**how))
    except Exception as error:
        back = dict(error=str(error), kind=type(error).__name__)
    say.write(json.dumps(back | dict(waits=list(waits)), default=str) + chr(10))
    say.flush()
"""


class Client:
    "A process with huggingface_hub in it, as a person starts one."

    def __init__(self, hub, home, **env):
        env = dict(
            os.environ,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(home),
            HF_HUB_DISABLE_PROGRESS_BARS='1',
            FLOWERDIFF_PROGRESS='',
            **env,
        )
        self.process = subprocess.Popen(
            [sys.executable, '-c', WORKER],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=home,
        )

    def __call__(self, what, token='hf_writer', **how):
        self.process.stdin.write(json.dumps([what, how, token]) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


@pytest.fixture(scope='module')
def hub():
    with Hub(TOKENS, part=100_000) as hub:
        yield hub


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    client = Client(hub, tmp_path_factory.mktemp('home'), HF_HUB_DISABLE_XET='1')
    yield client
    client.close()


@pytest.fixture(scope='module')
def xet(tmp_path_factory):  # another Hub with a storage of hf_xet behind it, and a client that uses it
    folder = tmp_path_factory.mktemp('xet')
    with Hub(TOKENS, xet=str(folder / 'storage')) as hub:
        client = Client(hub, folder, HF_HUB_DISABLE_XET='0')
        yield hub, client
        client.close()


@pytest.fixture(scope='module')
def meadow(tmp_path_factory):
    ws = open_workspace(
        tmp_path_factory.mktemp('hub') / 'meadow',
        'garden',
        {'evaluate.steps': 2, 'publish.destination': 'hub'},
    )
    tiny_model(ws.model)
    ws.report.mkdir()
    Image.new('RGB', (64, 64), 'pink').save(ws.report / 'grid.png')
    write_json(
        ws.report / 'metrics.json',
        dict(
            adherence=dict(color=dict(value=0.985, low=0.957, high=0.995)),
            kid=dict(drawn=dict(value=0.03), autoencoder=dict(value=0.01)),
            clip_score=dict(shuffled=dict(value=3.0)),
        ),
    )
    write_jsonl(
        ws.captions / 'metadata.jsonl',
        [dict(file_name=f'test/{i}.png', captions=[f'a "rose", number {i}']) for i in range(4)],
    )
    return ws


@pytest.fixture
def publish(hub, client, meadow):  # a fresh copy of the workspace each time; forgets what was asked
    hub.clear()

    def go(name, root=meadow.root, token='hf_writer', by=client, **settings):
        return by(
            'publish',
            token,
            root=str(root),
            overrides={'publish.repo_name': name, 'publish.private': True, 'publish.license': 'apache-2.0'}
            | settings,
        )

    return go


@pytest.fixture
def ws(meadow, tmp_path):
    shutil.copytree(meadow.root, tmp_path / 'meadow')
    return open_workspace(tmp_path / 'meadow')


def one_line(back, *words):  # a mistake of a person, told in one line
    assert back.get('kind') == 'UserError', back
    assert '\n' not in back['error'] and len(back['error']) < 400 and 'hf_' not in back['error'], back[
        'error'
    ]
    for w in words:
        assert w in back['error'], back['error']


def bare(hub, name):  # nothing of ours is there
    repo = hub.repos.get(('model', name))
    return not repo or (set(repo.files) == {'.gitattributes'} and len(repo.commits) == 1)


@pytest.mark.parametrize('way', ['lfs', 'xet'])
def test_downloaded_again_it_draws_the_same(way, request, hub, client, publish, ws, tmp_path):
    """Breaks when: a component is left out of `model_files`; large files are committed without being sent;
    `private` is not passed on; the second run sends anything."""
    server, by = request.getfixturevalue('xet') if way == 'xet' else (hub, client)
    done = publish(f'someone/{way}', ws.root, by=by)['value']['published']
    repo = server.repos['model', f'someone/{way}']
    assert (
        done['changed']
        and done['revision'] == repo.head
        and len(repo.commits) == 2
        and repo.commits[1]['author'] == 'someone'
    )
    assert repo.private and done['private'] and done['url'] == f'{server.url}/someone/{way}'
    assert (
        'sha256' in repo.files['unet/diffusion_pytorch_model.safetensors']
        and 'sha256' not in repo.files['model_index.json']
        and '.gitattributes' in repo.files
    )
    assert by('same', repo=f'someone/{way}@{repo.head}', model=str(ws.model))['value'] == [True] * 3
    folder = Path(by('snapshot', repo=f'someone/{way}', local_dir=str(tmp_path / 'again'))['value'])
    assert {f['path'] for f in done['files']} == {
        p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and '.cache' not in p.parts
    } - {'.gitattributes'}
    if way == 'xet':
        assert (
            server.asked('GET .*xet-write-token')
            and server.asked('GET .*xet-read-token')
            and not server.asked('PUT')
            and not server.lfs
        )
    else:
        assert server.asked('PUT /lfs/.* 200') and server.asked(
            'POST /lfs/.*/complete 200'
        )  # in one piece, and in parts
    assert (
        by('snapshot', '', repo=f'someone/{way}', cache_dir=str(tmp_path / 'nobody'))['kind']
        == 'RepositoryNotFoundError'
    )
    assert 'hf_' not in ''.join(
        p.read_text() for p in (*ws.root.glob('*.json'), *ws.work.rglob('*.json'), ws.root / 'params.yaml')
    )
    server.clear()
    again = publish(f'someone/{way}', ws.root, by=by)['value']
    assert (
        not again['published']['changed']
        and again['published']['revision'] == repo.head
        and 'unchanged' in again['summary']
    )
    assert server.asked() and not server.asked('POST|PUT') and len(repo.commits) == 2


def test_only_what_changed_is_sent(hub, publish, ws):
    "Breaks when `hub_changes` compares less (everything is sent), or does not remove."
    publish('someone/changes', ws.root)
    repo = hub.repos['model', 'someone/changes']
    before = dict(repo.files)
    hub.clear()
    (ws.report / 'grid.png').unlink()
    done = publish('someone/changes', ws.root)['value']['published']
    assert done['changed'] and len(repo.commits) == 3 and not hub.asked('PUT|/lfs/')
    assert before.keys() - repo.files.keys() == {'samples/grid.png'} and {
        p for p in repo.files if repo.files[p] != before[p]
    } == {'README.md'}


def test_private_unless_asked_and_never_into_a_public_one(hub, publish):
    "Breaks when `publish.private` is ignored for a new repository, or the look at an old one is left out."
    publish('someone/shown', **{'publish.private': False})
    repo = hub.repos['model', 'someone/shown']
    head = repo.head
    assert not repo.private and len(repo.commits) == 2
    one_line(
        publish('someone/shown', **{'publish.private': True, 'publish.license': 'mit'}), 'is public there'
    )
    assert repo.head == head
    publish('someone/kept', **{'publish.private': True})
    done = publish('someone/kept', **{'publish.private': False})['value'][
        'published'
    ]  # the setting says public, the repository is not
    assert hub.repos['model', 'someone/kept'].private and done['private'] is True


def test_moved_on_is_not_overwritten(hub, publish, ws):
    "Breaks when `check_ours` is not asked, its line leads nowhere, or the commit has no parent."
    publish('someone/moved', ws.root)
    repo = hub.repos['model', 'someone/moved']
    repo.commit('by hand', dict(repo.files, **{'README.md': repo.blob(b'better words')}), 'a colleague')
    head = repo.head
    back = publish('someone/moved', ws.root)
    one_line(back, head[:12], 'did not publish')
    said, memory = re.search(r'write (.*) into (.*) and run again', back['error']).groups()
    Path(memory).write_text(said, encoding='utf-8')  # as the line says
    assert (
        publish('someone/moved', ws.root)['value']['published']['changed'] and repo.commits[-2]['oid'] == head
    )
    publish('someone/race', ws.root)
    repo = hub.repos['model', 'someone/race']
    hub.fault(
        'POST .*/race/commit',
        first=lambda: repo.commit(
            'faster', dict(repo.files, **{'note.txt': repo.blob(b'me first')}), 'a colleague'
        ),
    )
    one_line(publish('someone/race', ws.root, **{'publish.license': 'mit'}), 'another commit came first')
    assert repo.commits[-1]['title'] == 'faster' and 'note.txt' in repo.files


def test_cut_midway_goes_on_with_what_is_missing(hub, client, publish, ws):
    """Breaks when large files are not sent before the commit, when a broken line is a traceback, or a
    second run sends all again."""
    hub.lfs.clear()
    hub.fault('PUT /lfs/', times=1000, skip=2, cut=1000)
    back = publish('someone/cut', ws.root)
    one_line(back, 'run again')
    assert bare(hub, 'someone/cut')
    assert sorted(set(back['waits'])) == [1, 2, 4, 8]  # the client tried by itself
    there = set(hub.lfs)
    hub.clear()
    done = publish('someone/cut', ws.root)['value']['published']
    sent = {line.split()[1].split('/')[2] for line in hub.asked('PUT /lfs/.* 200')}
    large = {f['sha256'] for f in hub.repos['model', 'someone/cut'].files.values() if 'sha256' in f}
    assert there and sent == large - there and done['revision'] == hub.repos['model', 'someone/cut'].head


def test_a_lost_answer_is_no_lost_commit(hub, publish, ws):
    """Breaks when `_commit` raises without asking what the Hub holds: then the next model is refused as
    another author's."""
    hub.fault('POST .*/lost/commit', lost=True)

    def repo():
        return hub.repos['model', 'someone/lost']

    done = publish('someone/lost', ws.root)['value']['published']
    assert done['changed'] and done['revision'] == repo().head and len(repo().commits) == 2
    assert (
        publish('someone/lost', ws.root, **{'publish.license': 'mit'})['value']['published']['changed']
        and len(repo().commits) == 3
    )
    hub.fault('POST .*/lost/commit', cut=10)  # and here it was not made
    one_line(publish('someone/lost', ws.root), 'the connection failed')
    assert len(repo().commits) == 3


NEVER = dict(times=1000)
CASES = dict(  # what goes wrong, and words of the line; all keep the repository as it is
    gone=(dict(request='POST .*/commit/', status=404), 'may not see it'),
    busy=(dict(request='POST .*/commit/', status=409), 'busy'),
    full=(dict(request='POST .*/objects/batch', status=413), 'quota is full'),
    full403=(
        dict(
            request='POST .*/objects/batch',
            status=403,
            message='Private repository storage limit reached, please upgrade your plan.',
        ),
        'quota is full',
    ),
    s3full=(dict(request='PUT /lfs/', status=413, **NEVER), 'quota is full'),
    paid=(dict(request='POST .*/create', status=402), 'quota'),
    hour=(
        dict(request='POST .*/preupload', status=429, headers={'Retry-After': '3600'}, **NEVER),
        'slow down',
        'in 3600 s',
    ),
    first=(
        dict(request='GET /api/models', status=429, headers={'RateLimit': '"api";r=0;t=55'}),
        'slow down',
        'in 55 s',
    ),
    always=(
        dict(request='POST .*/preupload', status=429, headers={'Retry-After': '100'}, **NEVER),
        'in 100 s',
    ),
    ill=(dict(request='POST .*/commit/', status=500, message='Internal Error'), 'answered 500', 'later'),
    down=(dict(request='POST .*/objects/batch', status=503, **NEVER), 'answered 503'),
    cut=(dict(request='.', cut=0, **NEVER), 'run again'),
    proxy=(dict(request='GET /api/models', status=200, body='<html>please log in</html>'), 'not the Hub'),
    forbidden=(dict(request='POST .*/commit/', status=403), 'may not write'),
    token=(dict(request='PUT /lfs/', status=401, **NEVER), 'token is not valid'),
)


@pytest.mark.parametrize('case', CASES)
def test_one_line_and_nothing_half_published(case, hub, publish):
    """Breaks when `hub_error` loses a status or `publish_hub` a kind of exception; `hour` and `always`
    when `patient_client` is left out (the client would wait)."""
    fault, *words = CASES[case]
    hub.lfs.clear()
    hub.fault(**fault)
    back = publish(f'someone/bad-{case}')
    one_line(back, f'someone/bad-{case}: ', *words)
    assert bare(hub, f'someone/bad-{case}')
    assert (
        sum(back['waits']) < 400
        and (case != 'hour' or back['waits'] == [])
        and (case != 'always' or back['waits'] == [101.0] * 3)
    )
    hub.clear()
    assert publish(f'someone/bad-{case}')['value']['published']['changed']  # the same again goes through


def test_the_client_waits_as_long_as_it_is_asked(hub, publish):
    "Breaks when `patient_client` gives up at the first 429."
    hub.fault('POST .*/preupload', times=2, status=429, headers={'Retry-After': '7'})
    back = publish('someone/slow')
    assert back['value']['published']['changed'] and back['waits'] == [8.0, 8.0]


def test_who_may(hub, publish):
    """Breaks when 401 and 403 are told as another thing, when no token is an error and not a skip, or when
    a token of one repository has to make it."""
    one_line(publish('someone/mine', token='hf_nobody'), 'token is not valid')
    one_line(publish('someone/mine', token='hf_reader'), 'may not write')
    one_line(publish('other/mine'), 'may not write')
    assert not hub.asked('PUT|commit')
    hub.clear()
    assert 'HF_TOKEN' in publish('someone/mine', token='')['value']['skipped'] and not hub.asked()
    one_line(publish('someone/given', token='hf_one'), 'may not write', 'make the repository first')
    hub.create(TOKENS['hf_writer'], 'given', visibility='private')
    assert publish('someone/given', token='hf_one')['value']['published']['changed']
    publish('other/secret', token='hf_other')
    one_line(publish('other/secret'), 'may not write')  # another's private one looks like none
    assert len(hub.repos['model', 'other/secret'].commits) == 2


@pytest.mark.parametrize(
    'name',
    [
        'meadow',
        'a/b/c',
        'some one/meadow',
        'someone/mea--dow',
        'someone/..',
        'someone/meadow.git',
        '/meadow',
        'someone/' + 'm' * 97,
        'jemand/blümchen',
    ],
)
def test_a_name_that_is_none(name, hub, publish):
    "Breaks when `repo_name` lets a name through that the Hub refuses."
    one_line(publish(name), 'publish.repo_name')
    assert not hub.asked()


def test_the_card_is_what_the_hub_reads(hub, publish, ws):
    "Breaks when the header has a field that the Hub's check refuses, or a wrong licence is a traceback."
    for profile, how in dict(
        garden={},
        flowers102={},
        celeba={},
        sd_finetune={'prepare.source': 'pictures'},
        folder={'prepare.source': 'pictures', 'publish.license': 'other'},
    ).items():
        from flowerdiff.evaluation.model_card import make_card

        card = make_card(
            open_workspace(ws.root.parent / profile, profile, how),
            'meadow',
            'someone/meadow',
            [dict(prompt='a "rose": red', file='samples/0.png')],
            onnx=True,
            engines={},
        )
        assert hub.validate(card) == ([], []), (profile, hub.validate(card))
    one_line(
        publish('someone/wrong', ws.root, **{'publish.license': 'my own'}), '400', '"license" must be one of'
    )
    assert bare(hub, 'someone/wrong')


def test_a_space_too(client, hub):
    "The stand-in's own: a Space is made, committed and read back."
    url, text, sdk, files = client('space', repo='someone/play', text='---\nsdk: docker\n---\n')['value']
    assert (
        url == f'{hub.url}/spaces/someone/play'
        and text == 'print(1)'
        and sdk == 'docker'
        and files == ['.gitattributes', 'README.md', 'app']
    )


def test_xet_refused_is_one_line_too(xet, publish):
    "Breaks when `_find_failure` does not read the status in hf_xet's text."
    server, by = xet
    for status, words in ((403, 'may not write'), (401, 'token is not valid'), (413, 'quota')):
        server.fault('GET .*xet-write-token', times=9, status=status)
        one_line(publish('someone/x', by=by), words)
        assert bare(server, 'someone/x')
        server.clear()


def test_the_command(hub, ws):
    "Breaks when the stage's line does not reach the person: exit code 2, no traceback."
    for place in (ws.onnx, ws.tensorrt):
        place.mkdir()
    env = dict(
        os.environ,
        HF_ENDPOINT=hub.url,
        HF_TOKEN='hf_reader',
        HF_HUB_DISABLE_XET='1',
        HF_HOME=str(ws.root.parent / 'home'),
    )
    p = subprocess.run(
        [
            sys.executable,
            '-m',
            'flowerdiff.pipeline.cli',
            'run',
            str(ws.root),
            '--only',
            'publish',
            '--set',
            'publish.repo_name=someone/typed',
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (
        p.returncode == 2
        and 'someone/typed: the token may not write there' in p.stderr
        and 'Traceback' not in p.stdout + p.stderr
    ), (p.returncode, p.stdout, p.stderr)
