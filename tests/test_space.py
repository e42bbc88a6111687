"""The Gradio app, and the folder that `flowerdiff space` writes, run from its own files.

The server is the Space's `python app.py`: one for all tests, in a process that finds no other flowerdiff,
and only the packages of the Space's requirements.txt.
FLOWERDIFF_TEST_SHOTS=FOLDER keeps screenshots."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
import yaml
from browser import (
    ENV,
    ROOT,
    browser_fixture,  # noqa: F401
    browser_only,
    free_port,
    open_page,
    shot,
    stop,
)
from hub_server import Hub
from PIL import Image

from flowerdiff.core.errors import UserError
from flowerdiff.drawing.pictures import read_picture

COMMIT = 'c0ffee12' * 5


def published(root: Path, **how) -> Path:  # a workspace whose model was published
    from flowerdiff.core.files import write_json
    from flowerdiff.core.workspace import open_workspace, write_jsonl

    open_workspace(root)
    write_jsonl(
        root / 'captions/metadata.jsonl',
        [dict(file_name=f'test/{i}.png', captions=[f'{i} red roses']) for i in range(3, 30)],
    )
    write_json(
        root / 'published.json',
        dict(dict(repository='meadow', kind='folder', private=False, revision='1'), **how),
    )
    return root


def export(model: Path):
    "Write the ONNX files of a model. Those who measured them had a GPU, and TensorRT was the fastest."
    from flowerdiff.core.files import write_json
    from flowerdiff.drawing.model_files import weights_fingerprint
    from flowerdiff.inference.onnx_export import copy_configs, export_part, model_parts
    from flowerdiff.inference.torch_backend import TorchBackend

    for name, part in model_parts(TorchBackend(model, 'cpu')).items():
        export_part(part, model / 'onnx' / name)
    copy_configs(model, model / 'onnx')
    measured = {name: dict(milliseconds=i, keeps=True) for i, name in enumerate(('tensorrt', 'onnx'))}
    parity = dict(model=weights_fingerprint(model), passed=True, backends=measured)
    write_json(model / 'onnx/parity.json', parity)


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    from tiny import tiny_model

    root = published(tmp_path_factory.mktemp('space') / 'meadow')
    export(tiny_model(root / 'published/meadow'))
    (root / 'published/meadow/README.md').write_text('# Meadow\n\nDraws a meadow.\n')
    return root


@pytest.fixture(scope='module')
def space(workspace, tmp_path_factory):
    from flowerdiff.apps.hf_space import make_space

    return make_space(workspace, tmp_path_factory.mktemp('written') / 'space')


ONLY_REQUIRED = """
import json, os, runpy, sys
from importlib.machinery import PathFinder

absent = {*json.loads(os.environ['ABSENT'])}


class Required(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in absent else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Required
sys.path[0] = os.getcwd()
runpy.run_path('app.py', run_name='__main__')
"""


def norm(name):
    return re.sub(r'[-_.]+', '-', name.lower())


def absent(space) -> list[str]:  # modules that are installed here and not in a Space
    lines = (space / 'requirements.txt').read_text().splitlines()
    required = {'flowerdiff'} | {norm(re.split('[=<>!~]', line)[0]) for line in lines}
    installed = packages_distributions().items()
    return [module for module, names in installed if not required & {*map(norm, names)}]


def start(space, **env):
    "The Space's program, at a port of ours. Without `site`, flowerdiff's editable install is not found."
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ('purelib', 'platlib'))
    own = dict(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    own['ABSENT'] = json.dumps(absent(space))
    return subprocess.Popen(
        [sys.executable, '-S', '-c', ONLY_REQUIRED],
        cwd=space,
        env={**os.environ, **own, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope='module')
def running(space):  # the server, its address
    port = free_port()
    server = start(space, GRADIO_SERVER_PORT=str(port))
    line = server.stdout.readline()
    assert f'The page is at http://127.0.0.1:{port}' in line, line + server.stdout.read()
    yield server, f'http://127.0.0.1:{port}'
    stop(server)
    assert '/flowerdiff/' not in (said := server.stdout.read()), said  # no traceback of ours


@pytest.fixture(scope='module')
def client(running):
    from gradio_client import Client

    return Client(running[1], verbose=False, analytics_enabled=False)


def visitor(url, address):  # as behind a proxy
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False, headers={'X-Forwarded-For': address})


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it never came'
        time.sleep(0.05)


# ---- the files


@pytest.mark.parametrize('of', ['folder', 'hub', 'name'])
def test_the_folder_is_whole(workspace, space, tmp_path, of):
    "Breaks when the Hub refuses the header, a file is not copied, or a package is at an untested version."
    from gradio import __version__ as gradio_version
    from huggingface_hub import SpaceCard

    from flowerdiff.apps.hf_space import make_space

    where = dict(
        hub=published(tmp_path / 'w', repository='ada/meadow', kind='hub', private=True, revision=COMMIT),
        name=f'ada/meadow@{COMMIT}',
    ).get(of)
    out = make_space(where, tmp_path / 'space') if where else space
    card = SpaceCard.load(out / 'README.md').data
    assert (card.sdk, card.app_file, card.models) == (
        'gradio',
        'app.py',
        None if of == 'folder' else ['ada/meadow'],
    )
    assert (card.sdk_version, card.python_version) == (gradio_version, '3.11')
    assert {card.colorFrom, card.colorTo} <= {
        'red',
        'yellow',
        'green',
        'blue',
        'indigo',
        'purple',
        'pink',
        'gray',
    }
    assert len(card.short_description) <= 60 and card.license == (None if of == 'name' else 'apache-2.0')
    assert ('HF_TOKEN' in (out / 'README.md').read_text()) == (of == 'hub')
    wanted = {'README.md', 'app.py', 'flowerdiff', 'requirements.txt'} | (
        {'model'} if of == 'folder' else set()
    )
    assert {p.name for p in out.iterdir()} - {'__pycache__'} == wanted
    assert (f'ada/meadow@{COMMIT}' in (out / 'app.py').read_text()) == (of != 'folder')

    pins = [line for line in (ROOT / 'constraints.txt').read_text().splitlines() if '==' in line]
    tested = {norm(line.partition('==')[0]): line.partition('==')[2] for line in pins}
    lines = [line for line in (out / 'requirements.txt').read_text().splitlines() if '==' in line]
    versions = {line.partition('==')[0]: line.partition('==')[2] for line in lines}
    assert {'gradio', 'onnxruntime', 'tokenizers', 'pillow', 'numpy'} <= set(versions)
    assert not {'flowerdiff', 'torch', 'diffusers', 'transformers', 'scipy', 'fastcore'} & set(versions)
    assert not list(out.rglob('*.safetensors')) and (out / 'model/unet/model.onnx').is_file() == (
        of == 'folder'
    )
    assert versions == {name: tested[norm(name)] for name in versions}


def test_what_is_pinned_is_what_the_space_needs(tmp_path, monkeypatch):
    "The markers are those of the Space's Python and system, whichever runs here."
    from flowerdiff.services import space_pins

    meadow = tmp_path / 'meadow-1.0.dist-info'
    meadow.mkdir()
    lines = [
        'Name: meadow',
        'Version: 1.0',
        'Requires-Python: >=3.11',
        'Requires-Dist: spade>=2; python_version < "3.12"',
        'Requires-Dist: rake; python_version >= "3.12"',
        'Requires-Dist: hoe; sys_platform == "darwin"',
        'Requires-Dist: shed; extra == "more"',
    ]
    (meadow / 'METADATA').write_text('\n'.join(['Metadata-Version: 2.1', *lines, '']))
    monkeypatch.syspath_prepend(tmp_path)
    assert space_pins.pinned(['meadow']) == ['meadow==1.0', 'spade>=2']
    monkeypatch.setitem(space_pins.SPACE_SYSTEM, 'python_version', '3.13')
    assert space_pins.pinned(['meadow']) == ['meadow==1.0', 'rake']
    (meadow / 'METADATA').write_text('\n'.join(['Metadata-Version: 2.1', *lines]).replace('>=3.11', '>=3.12'))
    with pytest.raises(UserError, match=r'does not run on Python 3\.11'):
        space_pins.pinned(['meadow'])


def test_a_folder_with_other_files_is_left_alone(workspace, tmp_path):
    from flowerdiff.apps.hf_space import make_space

    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/app.py').write_text('import this')
    with pytest.raises(UserError, match='not a Space'):
        make_space(workspace, tmp_path / 'photos')
    assert [p.name for p in (tmp_path / 'photos').iterdir()] == ['app.py']


@pytest.mark.parametrize('kind, repository', [('folder', 'meadow'), ('hub', 'ada/meadow')])
def test_a_model_without_onnx_files_is_refused(tmp_path, kind, repository):
    "Breaks when a Space is written that cannot draw."
    from flowerdiff.apps.hf_space import make_space

    files = [dict(path='unet/diffusion_pytorch_model.safetensors')]
    root = published(tmp_path / 'w', kind=kind, repository=repository, revision=COMMIT, files=files)
    (root / 'published/meadow').mkdir(parents=True)
    (root / 'published/meadow/model_index.json').write_text('{}')
    with pytest.raises(UserError, match=r'has no ONNX files.*flowerdiff run .*--from onnx'):
        make_space(root, tmp_path / 'space')


@pytest.mark.parametrize(
    'where, says',
    [('nowhere', 'not published'), ('ada/meadow@main', 'one commit'), ('ada/meadow', 'one commit')],
)
def test_mistakes_are_one_line(cli, tmp_path, where, says):
    done = cli('space', where, cwd=tmp_path)
    assert (
        done.returncode == 2
        and says in done.stderr
        and len(done.stderr.splitlines()) == 1
        and not (tmp_path / 'space').exists()
    )


def test_the_command(cli, workspace, tmp_path):
    done = cli('space', workspace, '-o', 'out', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'python out/app.py' in done.stdout and '--push OWNER/NAME' in done.stdout
    assert (tmp_path / 'out/app.py').is_file()


@pytest.mark.parametrize('mistake', ['no model', 'a port in use', 'no address of this machine'])
def test_serve_says_it_in_a_line(cli, workspace, tmp_path, mistake):
    "Breaks when a traceback is shown, or another port is taken silently."
    import socket

    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        model = workspace / 'published/meadow'
        words, says = {
            'no model': ((tmp_path,), 'holds no model'),
            'a port in use': ((model, '--port', port), 'in use'),
            'no address of this machine': ((model, '--host', '192.0.2.1'), 'not an address of this machine'),
        }[mistake]
        done = cli('serve', *words)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1, done
    assert says in done.stderr


# ---- drawing


def own(folder, requests):  # the Generator's pictures of them, in a process with as many threads
    code = (
        'import json, numpy as np; from flowerdiff import Generator; '
        f'g = Generator.from_pretrained({str(folder)!r})\n'
        f'np.save({str(folder.parent / "own.npy")!r}, np.stack([np.array(p) '
        f'for r in json.loads({json.dumps(requests)!r}) for p in g(**r)]))'
    )
    subprocess.run([sys.executable, '-c', code], check=True, env=ENV)
    return np.load(folder.parent / 'own.npy')


def test_the_api_draws_the_generators_pictures(client, workspace):
    "Breaks when a field of the API is not what the Generator is given, or a PNG does not hold its settings."
    plain = dict(prompt='a red rose', seed=7, steps=6, pictures=2)
    other = dict(prompt='a blue iris', negative='a red sky', seed=3, steps=5, guidance=2.5, sampler='euler')
    drawn, notes, link = client.predict(**plain, api_name='/generate')
    drawn += client.predict(**other, api_name='/generate')[0]
    pictures = [Image.open(shown['image']) for shown in drawn]
    requests = [
        dict(prompt='a red rose', seed=7, num_inference_steps=6, num_images_per_prompt=2),
        dict(
            prompt='a blue iris',
            negative_prompt='a red sky',
            seed=3,
            num_inference_steps=5,
            guidance_scale=2.5,
            scheduler='euler',
        ),
    ]
    assert np.array_equal(
        own(workspace / 'published/meadow', requests), np.stack([np.array(p) for p in pictures])
    )
    settings = [read_picture(shown['image']) for shown in drawn]
    assert [(s.prompt, s.seed, s.num_inference_steps) for s in settings] == [
        ('a red rose', 7, 6),
        ('a red rose', 8, 6),
        ('a blue iris', 3, 5),
    ]
    assert (settings[2].negative_prompt, settings[2].guidance_scale) == ('a red sky', 2.5)
    assert settings[2].scheduler == 'euler' and json.loads(pictures[2].text['invokeai_metadata'])['seed'] == 3
    assert [p.format for p in pictures] == ['PNG'] * 3
    assert notes.startswith('2 pictures in') and 'seed=7' in link and 'pictures=2' in link


def test_another_size(client, workspace):
    # a size that is not passed on, or is turned by 90 degrees
    request = dict(prompt='a rose', seed=2, steps=3, size='48x32')
    [shown], _, link = client.predict(**request, api_name='/generate')
    [expected] = own(
        workspace / 'published/meadow',
        [dict(prompt='a rose', seed=2, num_inference_steps=3, size=[48, 32])],
    )
    assert Image.open(shown['image']).size == (48, 32) and 'size=48x32' in link
    assert '48 × 32 pixels' in shown['caption']
    assert np.array_equal(np.array(Image.open(shown['image'])), expected)


def test_a_picture_to_start_from(client, workspace, tmp_path):
    "Breaks when the upload or its strength is lost, or when a file is read that is no upload or no picture."
    from gradio_client import handle_file

    path = tmp_path / 'start.png'
    Image.linear_gradient('L').convert('RGB').resize((48, 32)).save(path)
    given = dict(prompt='a rose', seed=2, steps=4, strength=0.5)
    [shown], _, link = client.predict(**given, image=handle_file(path), api_name='/generate')
    assert read_picture(shown['image']).strength == 0.5 and 'strength=0.5' in link
    request = dict(prompt='a rose', seed=2, num_inference_steps=4, image=str(path), strength=0.5)
    drawn = np.array(Image.open(shown['image']))
    assert np.array_equal(own(workspace / 'published/meadow', [request])[0], drawn)
    plain = Image.open(client.predict(**given, api_name='/generate')[0][0]['image'])
    assert not np.array_equal(np.array(plain), drawn)
    (tmp_path / 'text.png').write_text('a rose')
    secret = dict(path='/etc/passwd', meta=dict(_type='gradio.FileData'))
    for image, says in (handle_file(tmp_path / 'text.png'), 'text.png is not a picture'), (secret, 'not'):
        with pytest.raises(Exception, match=says) as told:
            client.predict(**given, image=image, api_name='/generate')
        assert len(str(told.value).splitlines()) == 1 and '/tmp' not in str(told.value), told.value


def test_without_a_seed_each_picture_is_another(client):
    seeds = set()
    for _ in range(2):
        drawn, _, _ = client.predict(prompt='a rose', steps=1, api_name='/generate')
        seeds.add(read_picture(drawn[0]['image']).seed)
    assert len(seeds) == 2


class Slow:
    "A generator that waits after each step until it may go on."

    def __init__(self):
        from flowerdiff.apps.demo import DemoGenerator

        self.demo, self.go, self.ended = DemoGenerator(), threading.Semaphore(0), []

    def __call__(self, prompt, *, callback, **settings):
        def on_step(step):
            self.go.acquire(timeout=20)
            return callback(step)

        try:
            return self.demo(prompt, callback=on_step, **settings)
        except Exception as error:
            self.ended.append(type(error).__name__)
            raise


@pytest.fixture(scope='module')
def slow():
    "An app whose generator waits for the test, and a client of it."
    from gradio_client import Client

    from flowerdiff.apps.gradio_app import build_app, launch
    from flowerdiff.apps.session import GenerationSession

    generator = Slow()
    app = build_app(GenerationSession('nowhere', load=lambda: generator))
    launch(app, '127.0.0.1', free_port(), prevent_thread_lock=True)
    generator.client = Client(app.local_url, verbose=False, analytics_enabled=False)
    yield generator
    app.close(verbose=False)


def test_cancel_ends_the_drawing(slow):
    "Breaks when a drawing goes on that was canceled, or the next one does not begin."
    slow.go.release()
    first = slow.client.submit(prompt='a rose', steps=50, api_name='/generate')
    wait_until(lambda: any(notes == 'Step 1 of 50' for _, notes, _ in first.outputs()))
    first.cancel()
    wait_until(first.done)
    slow.go.release()
    wait_until(lambda: slow.ended)
    for _ in range(5):
        slow.go.release()
    drawn, _, _ = slow.client.predict(prompt='a tulip', steps=5, api_name='/generate')
    assert drawn[0]['caption'].startswith('a tulip') and slow.ended == ['Cancelled']


def test_twenty_wait_and_one_too_many_is_refused(slow):
    "Each has its own picture and place, and a program that does not fit in hears it in a line."
    slow.go.release()
    busy = slow.client.submit(prompt='a rose', steps=2, api_name='/generate')
    wait_until(lambda: busy.outputs())
    jobs = [
        slow.client.submit(prompt=f'a rose {i}', seed=i, steps=1, api_name='/generate') for i in range(21)
    ]
    wait_until(lambda: any(job.done() for job in jobs))  # the one that is refused
    wait_until(lambda: sorted(job.status().rank or 0 for job in jobs if not job.done()) == [*range(20)])
    for _ in range(30):
        slow.go.release()
    wait_until(lambda: all(job.done() for job in jobs))
    [refused] = [str(job.exception()) for job in jobs if job.exception()]
    assert 'Queue is full' in refused and '\n' not in refused
    for i, job in enumerate(jobs):
        if not job.exception():
            [shown] = job.result()[0]
            assert shown['caption'].startswith(f'a rose {i} · seed {i} ')


def test_mistakes_of_programs_are_one_line(client):
    from gradio_client.exceptions import AppError

    for mistake, says in (
        (dict(prompt=' '), 'Enter a prompt'),
        (dict(prompt='rose ' * 200), 'characters'),
        (dict(steps=0), 'Steps|minimum'),
        (dict(pictures=9), 'Pictures|maximum'),
        (dict(seed=-1), 'Seed'),
        (dict(sampler='none'), 'none'),
        (dict(size='4096x4096'), '4096x4096'),
    ):
        with pytest.raises((AppError, ValueError)) as told:
            client.predict(**{'prompt': 'a rose', **mistake}, api_name='/generate')
        assert re.search(says, str(told.value)) and 'Traceback' not in str(told.value), told.value


def test_hostile_requests_leave_the_server_as_it_was(running, client):
    "Each is refused, by the process that was there before."
    server, url = running
    before = psutil.Process(server.pid).create_time()
    good = dict(prompt='a rose', seed=1, steps=1)
    bodies = [b'', b'[' * 60_000, b'{"data": ' + b'9' * 50_000 + b'}', b'null', b'{"data": []}']
    wild = [None, True, {}, [], 'x' * 9999, 1e309, -1, {'path': '/etc/passwd'}, [['a']]]
    bodies += [json.dumps(dict(data=[value] * 12)).encode() for value in wild]
    for body in bodies:
        ask = Request(f'{url}/gradio_api/call/generate', body, {'Content-Type': 'application/json'})
        try:
            event = json.load(urlopen(ask, timeout=60))['event_id']
            said = urlopen(f'{url}/gradio_api/call/generate/{event}', timeout=60).read().decode()
            assert 'event: error' in said and 'event: complete' not in said, (body[:80], said[:200])
        except HTTPError as error:
            assert error.code in (400, 404, 422, 500), body[:80]
    for path in ('/etc/passwd', str(ROOT / 'settings.ini')):
        with pytest.raises(HTTPError):
            urlopen(f'{url}/gradio_api/file={path}', timeout=60)
    assert server.poll() is None and psutil.Process(server.pid).create_time() == before
    assert len(client.predict(**good, api_name='/generate')[0]) == 1


def test_the_rate_limit_counts_by_address(running):
    "Breaks when a new page or a forged address evades the limit, or one address uses up that of another."
    url = running[1]

    def ask(address):
        return visitor(url, address).predict(prompt='a rose', steps=1, pictures=8, api_name='/generate')

    first = visitor(url, '8.8.8.8')
    for _ in range(15):
        first.predict(prompt='a rose', steps=1, pictures=8, api_name='/generate')
    for address in ('8.8.8.8', '1.1.1.1, 8.8.8.8'):
        with pytest.raises(Exception, match='The limit is 120 pictures per minute'):
            ask(address)
    assert len(ask('8.8.4.4')[0]) == 8


# ---- the page


@browser_only
def test_words_become_a_picture(browser, running):
    "And nothing is asked of other hosts, the settings are in the link, and a phone shows the page."
    page = open_page(browser, running[1])
    page.get_by_label('Prompt', exact=True).fill('a red rose')
    page.get_by_text('Settings', exact=True).click()
    page.get_by_label('Seed', exact=True).fill('11')
    page.get_by_role('button', name='Draw', exact=True).click()
    link = page.get_by_text('Link to these settings')
    link.wait_for()
    picture = (
        page.get_by_role('button', name='Thumbnail')
        .or_(page.locator('.grid-wrap button'))
        .locator('img')
        .first
    )
    picture.wait_for()
    assert picture.evaluate('e => e.decode().then(() => e.naturalWidth)') == 32
    assert '1 picture in' in page.get_by_label('Notes').input_value()
    shot(page, 'gradio')
    again = open_page(browser, f'{running[1]}/{link.get_attribute("href")}&steps=7&guidance=no')
    again.get_by_text('Settings', exact=True).click()
    again.wait_for_function('document.querySelector("textarea").value == "a red rose"')
    assert again.get_by_label('Seed', exact=True).input_value() == '11'
    again.set_viewport_size(dict(width=390, height=844))
    assert again.evaluate('document.documentElement.scrollWidth') <= 390
    assert page.foreign == [] and again.foreign == []


# ---- a model on the Hub


def test_the_model_is_fetched_at_its_commit(workspace, tmp_path):
    "What is in the Hub's cache for this commit is served; of another commit there is one line."
    from flowerdiff.apps.hf_space import make_space

    cache = tmp_path / 'hub/models--ada--meadow/snapshots' / COMMIT
    shutil.copytree(workspace / 'published/meadow', cache)
    env = dict(HF_HUB_CACHE=str(tmp_path / 'hub'), HF_HUB_OFFLINE='1')
    code = f"from flowerdiff.apps.model_info import fetch_onnx; print(fetch_onnx('ada/meadow@{COMMIT}'))"
    done = subprocess.run([sys.executable, '-c', code], env=ENV | env, capture_output=True, text=True)
    assert done.stdout.strip() == str(cache / 'onnx'), done
    server = start(make_space(f'ada/meadow@{"0" * 40}', tmp_path / 'space'), **env)
    said = server.communicate(timeout=120)[0]
    assert server.returncode == 1 and said.startswith('ada/meadow@0000') and 'HF_TOKEN' in said
    assert len(said.splitlines()) == 1, said


# ---- to the Hub


def test_a_push_is_one_commit_and_none_when_nothing_changed(workspace, tmp_path):
    "Breaks when a push is not whole or not private, repeats itself, or overwrites what another user changed."
    from huggingface_hub import CommitOperationAdd, HfApi

    from flowerdiff.apps.hf_space import make_space, push_space

    home = published(tmp_path / 'w')
    shutil.copytree(workspace / 'published', home / 'published')
    with Hub(dict(hf_ada=dict(user='ada', write=True)), xet=str(tmp_path / 'xet')) as hub:
        api = HfApi(hub.url, token='hf_ada')

        def push():
            return push_space(make_space(home, tmp_path / 'space'), 'ada/studio', home, api)

        first = push()
        repo = hub.repo('space', 'ada/studio', dict(user='ada', write=True))
        assert (
            first['changed']
            and first['url'] == f'{hub.url}/spaces/ada/studio'
            and (repo.private, repo.sdk) == (True, 'gradio')
        )
        assert set(repo.files) - {'.gitattributes'} == {
            p.relative_to(tmp_path / 'space').as_posix()
            for p in (tmp_path / 'space').rglob('*')
            if p.is_file()
        }
        n = len(repo.commits)
        assert not push()['changed'] and len(repo.commits) == n
        repo.private = False  # its owner shows it to everyone
        shutil.rmtree(home / 'captions')
        (tmp_path / 'space/README.md').unlink()
        assert push()['changed'] and len(repo.commits) == n + 1
        api.create_commit(
            'ada/studio',
            [CommitOperationAdd('theirs.txt', b'by hand')],
            repo_type='space',
            commit_message='by hand',
        )
        with pytest.raises(UserError, match='did not publish'):
            push()
        assert 'theirs.txt' in repo.files


def test_the_workflow_keeps_no_token_and_deploys_what_was_tested():
    text = (ROOT / '.github/workflows/space.yml').read_text()
    flow = yaml.safe_load(text)
    build, deploy = flow['jobs']['build'], flow['jobs']['deploy']
    assert (
        'secrets.' not in text
        and deploy['needs'] == 'build'
        and deploy['environment']['name'] == 'space'
        and flow['permissions'] == {}
    )
    assert (
        deploy['permissions'] == {'id-token': 'write', 'contents': 'read'}
        and 'id-token' not in build['permissions']
    )
    runs = [s.get('run', '') for s in build['steps']]
    assert next(i for i, r in enumerate(runs) if '.ci/run' in r) < next(
        i for i, r in enumerate(runs) if 'flowerdiff space' in r
    )
    assert (
        flow[True]['push']['branches'] == ['main']
        and 'nbs/apps/**' in flow[True]['push']['paths']
        and 'pull_request' not in flow[True]
    )
