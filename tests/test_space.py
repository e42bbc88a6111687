"""The folder that `flowerdiff space` writes, run by its Dockerfile's own command.

The server runs as an ordinary user, in a read-only folder, with only the packages of requirements.txt,
and its page is shown in a frame of huggingface.co. Docker is not needed, and not tried.
FLOWERDIFF_TEST_SHOTS=FOLDER keeps screenshots."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest
import yaml
from browser import PATIENCE, ROOT, browser_only, chromium, free_port, shot, stop
from hub_server import Hub

from flowerdiff.core.schema import UserError

COMMIT = 'c0ffee12' * 5
USER = 1000  # the Hub's number


def instructions(dockerfile: Path) -> list:  # (word, what follows it)
    text = re.sub(
        r'\\\n\s*',
        '',
        '\n'.join(
            line for line in dockerfile.read_text(encoding='utf-8').splitlines() if not line.startswith('#')
        ),
    )
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def command(dockerfile: Path, word: str) -> list:
    [line] = [rest for w, rest in instructions(dockerfile) if w == word]
    return json.loads(line[line.index('[') :])


def published(root: Path, **how) -> Path:  # a workspace whose model was published
    from flowerdiff.core.workspace import open_workspace, write_json, write_jsonl

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


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    from tiny import tiny_model

    root = published(tmp_path_factory.mktemp('space') / 'meadow')
    tiny_model(root / 'published/meadow')
    return root


@pytest.fixture(scope='module')
def open_tmp():  # that another user can enter, as pytest's are not
    folder = Path(tempfile.mkdtemp(prefix='flowerdiff-space-'))
    folder.chmod(0o755)
    yield folder
    subprocess.run(['chmod', '-R', 'u+w', folder])
    shutil.rmtree(folder)


@pytest.fixture(scope='module')
def space(workspace, open_tmp):
    from flowerdiff.apps.hf_space import make_space

    out = make_space(workspace, open_tmp / 'app')
    subprocess.run(['chmod', '-R', 'a-w', out], check=True)
    return out


@pytest.fixture(scope='module')
def python(space, open_tmp):
    "An environment with the packages of requirements.txt and flowerdiff, and none other."
    venv = open_tmp / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    packages, here = next(venv.glob('lib/python*/site-packages')), Path(sysconfig.get_path('purelib'))
    for line in (space / 'requirements.txt').read_text().splitlines():
        if '==' not in line:
            continue
        for f in distribution(line.partition('==')[0]).files:
            to = Path(os.path.normpath(packages / (f if f.parts[0] == '..' else f.parts[0])))
            if to.exists() or to.parent.name in ('bin', '__pycache__'):
                continue
            if f.parts[0] == '..':
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(
                    os.path.normpath(here / f), to
                )  # a kernel, a template: no server would follow a link
            else:
                to.symlink_to(here / f.parts[0])
    (packages / 'flowerdiff.pth').write_text(f'{ROOT}\n')
    return venv / 'bin/python'


def as_image_user():
    "Under root: run as the image's user, who may read all (Python may be in root's home), write nothing."
    caps = '-all,+dac_read_search'
    return (
        [
            'setpriv',
            f'--reuid={USER}',
            f'--regid={USER}',
            '--clear-groups',
            f'--inh-caps={caps}',
            f'--ambient-caps={caps}',
            f'--bounding-set={caps}',
        ]
        if os.getuid() == 0
        else []
    )


class Running:
    "The Dockerfile's command at a port of ours."

    def __init__(self, space, python, home, **env):
        self.port, home = free_port(), Path(home)
        self.url, self.home = f'http://127.0.0.1:{self.port}', home
        home.mkdir()
        os.chown(home, USER, USER) if os.getuid() == 0 else None
        said = dict(
            shlex.split(v)[0].split('=', 1)
            for w, rest in instructions(space / 'Dockerfile')
            if w == 'ENV'
            for v in shlex.split(rest)
        )
        env = {
            **said,
            'HOME': str(home),
            'TMPDIR': str(home),
            'PORT': str(self.port),
            'PATH': f'{python.parent}:/usr/bin:/bin',
            'OMP_NUM_THREADS': '1',
            'HF_HUB_OFFLINE': '1',
            **env,
        }
        self.process = subprocess.Popen(
            as_image_user() + command(space / 'Dockerfile', 'CMD'),
            cwd=space,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def told(self):
        return self.process.stdout.readline()


@pytest.fixture(scope='module')
def running(space, python, open_tmp):
    server = Running(space, python, open_tmp / 'home')
    line = server.told()
    assert 'http://localhost' in line, line + server.process.stdout.read()
    yield server
    stop(server.process)


def health(url):
    try:
        answer = urlopen(f'{url}/health', timeout=30)
    except HTTPError as e:
        answer = e
    return answer.status, answer.read().decode()


def well(url):  # its words, when the model is loaded
    for _ in range(1200):
        if (now := health(url))[0] == 200:
            return now[1]
        time.sleep(0.1)
    raise AssertionError(now)


# ---- the files


@pytest.mark.parametrize('of', ['folder', 'hub', 'name', 'wheel'])
def test_the_folder_is_whole(workspace, tmp_path, of):
    "Breaks when the Hub refuses the header, a file is not copied, or a package is at an untested version."
    from huggingface_hub import SpaceCard

    from flowerdiff.apps.hf_space import make_space

    wheel = tmp_path / 'flowerdiff-9.9-py3-none-any.whl'
    wheel.touch()
    where = dict(
        hub=published(tmp_path / 'w', repository='ada/meadow', kind='hub', private=True, revision=COMMIT),
        name=f'ada/meadow@{COMMIT}',
    ).get(of, workspace)
    out = make_space(where, tmp_path / 'space', wheel if of == 'wheel' else None)
    card = SpaceCard.load(out / 'README.md').data
    assert (card.sdk, card.app_port, card.models) == (
        'docker',
        7860,
        ['ada/meadow'] if of in ('hub', 'name') else None,
    )
    assert (
        {card.colorFrom, card.colorTo}
        <= {'red', 'yellow', 'green', 'blue', 'indigo', 'purple', 'pink', 'gray'}
        and len(card.short_description) <= 60
        and card.license == (None if of == 'name' else 'apache-2.0')
    )
    assert ('HF_TOKEN' in (out / 'README.md').read_text()) == (of == 'hub')
    steps = instructions(out / 'Dockerfile')
    words = [w for w, _ in steps]
    copied = [s for w, rest in steps if w == 'COPY' for s in rest.split()[:-1]]
    assert sorted(copied) == sorted(
        p.name for p in out.iterdir() if p.name not in ('README.md', 'Dockerfile')
    )
    assert (out / 'model/unet').is_dir() == (of in ('folder', 'wheel')) and (
        f'ada/meadow@{COMMIT}' in (out / 'start.py').read_text()
    ) == (of in ('hub', 'name'))
    assert ('./flowerdiff-9.9-py3-none-any.whl' in dict(steps)['RUN']) == (of == 'wheel')
    assert (
        re.fullmatch(r'python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}', dict(steps)['FROM'])
        and 'ADD' not in words
        and dict(steps)['EXPOSE'] == '7860'
    )
    assert (
        dict(steps)['USER'] == 'user'
        and words.index('USER') < words.index('CMD')
        and max(i for i, w in enumerate(words) if w in ('RUN', 'COPY')) < words.index('USER')
        and f'--uid {USER} user' in steps[1][1]
    )

    def norm(s):
        return re.sub(r'[-_.]+', '-', s.lower())

    tested = {
        norm(line.partition('==')[0]): line.partition('==')[2]
        for line in (ROOT / 'constraints.txt').read_text().splitlines()
        if '==' in line
    }
    index, *lines = (out / 'requirements.txt').read_text().splitlines()
    assert (
        index == '--extra-index-url https://download.pytorch.org/whl/cpu'
        and f'torch=={tested["torch"]}+cpu' in lines
    )
    assert not [
        line
        for line in lines
        if line.removesuffix('+cpu') != f'{(n := line.partition("==")[0])}=={tested[norm(n)]}'
    ]


def test_what_is_pinned_is_what_the_space_needs(tmp_path, monkeypatch):
    "The markers are those of the Space's Python and system, whichever runs here."
    from flowerdiff.apps.hf_space import BASE
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
    assert BASE.startswith(f'python:{space_pins.SPACE_SYSTEM["python_full_version"]}-')


@pytest.mark.parametrize(
    'header', [b'{', b'[' * 1000, b'{"w":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}']
)
@pytest.mark.parametrize('size', [None, 2**62, 3])
def test_a_false_header_gives_no_visitors_but_a_line(header, size, tmp_path):
    from flowerdiff.apps.hf_space import weights_gb

    (tmp_path / 'unet').mkdir()
    size = len(header) if size is None else size
    (tmp_path / 'unet/model.safetensors').write_bytes(size.to_bytes(8, 'little') + header + bytes(4))
    with pytest.raises(UserError, match='damaged weights') as e:
        weights_gb(tmp_path)
    assert '\n' not in str(e.value)


def test_a_folder_with_other_files_is_left_alone(workspace, tmp_path):
    from flowerdiff.apps.hf_space import make_space
    from flowerdiff.core.schema import UserError

    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/Dockerfile').write_text('FROM scratch')
    with pytest.raises(UserError, match='not a Space'):
        make_space(workspace, tmp_path / 'photos')
    assert [p.name for p in (tmp_path / 'photos').iterdir()] == ['Dockerfile']


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
    assert (
        done.returncode == 0
        and 'python out/start.py' in done.stdout
        and '--push OWNER/NAME' in done.stdout
        and (tmp_path / 'out/Dockerfile').is_file()
    ), done.stderr


# ---- running


def test_what_is_installed(python):
    "Breaks when a package for drawing is missing, or one for training is installed."

    def call(names):
        return subprocess.run(
            [python, '-c', f'import {names}'],
            env=dict(HOME=os.environ['HOME']),
            capture_output=True,
            text=True,
        )

    assert (
        call(
            'flowerdiff.inference.generator, flowerdiff.apps.serving, onnxruntime, diffusers, transformers'
        ).returncode
        == 0
    )
    assert 'No module named' in call('mlflow').stderr and 'No module named' in call('dvc').stderr


def test_the_health_check(space, running):
    "The Dockerfile's own check, at our port."
    check = [a.replace(':7860', f':{running.port}') for a in command(space / 'Dockerfile', 'HEALTHCHECK')]
    well(running.url)
    assert (
        check != command(space / 'Dockerfile', 'HEALTHCHECK')
        and subprocess.run([sys.executable, *check[1:]]).returncode == 0
    )
    assert well(running.url) == 'ok; 0 of 16 visitors\n'  # for a small model in 3 GB
    assert subprocess.run(
        [sys.executable, *[a.replace(f':{running.port}', f':{free_port()}') for a in check[1:]]],
        capture_output=True,
    ).returncode


@pytest.fixture(scope='module')
def browser():
    with chromium('--disable-features=LocalNetworkAccessChecks') as b:
        yield b  # a page of the world may not open this machine's, which here stands for the Hub's


def framed(browser, site, url):
    "A page of `site` that shows `url` in a frame of the size that the Hub gives a Space."
    page = browser.new_context(viewport=dict(width=1280, height=800)).new_page()
    page.set_default_timeout(PATIENCE)
    page.said, page.foreign = [], []
    page.on('console', lambda m: page.said.append(m.text))
    page.on(
        'request',
        lambda r: (
            page.foreign.append(r.url)
            if not r.url.startswith((site, url, url.replace('http', 'ws', 1), 'data:', 'blob:'))
            else None
        ),
    )
    page.route(
        f'{site}/**',
        lambda r: r.fulfill(
            content_type='text/html',
            body='<body style="margin:0"><header style="height:60px">Spaces</header>'
            f'<iframe src="{url}" style="width:100%;height:740px;border:0"></iframe>',
        ),
    )
    page.goto(f'{site}/spaces/ada/meadow')
    return page


@browser_only
def test_a_picture_inside_the_hubs_frame(browser, space, running):
    "Breaks when the page needs cookies, may not be framed by the Hub, or its kernel outlives the visit."
    before = sorted((str(p), p.stat().st_mtime_ns) for p in space.rglob('*'))
    page = framed(browser, 'https://huggingface.co', running.url)
    frame = page.frame_locator('iframe')
    frame.get_by_text('Ready.').wait_for()
    assert (
        frame.get_by_label('Prompt', exact=True).is_visible()
        and 'meadow' in frame.locator('.fd-head').inner_text()
    )
    assert re.fullmatch(
        r'\d+ red roses', frame.locator('.fd-chip').first.inner_text()
    )  # the Space's own examples
    frame.get_by_role('button', name='Generate', exact=True).click()
    frame.get_by_text(re.compile(r'picture in [\d.]+ s')).wait_for()
    assert frame.locator('.fd-card img').first.evaluate('e => e.decode().then(() => e.naturalWidth)') == 32
    shot(page, 'space')
    assert (
        page.context.cookies() == []
        and page.foreign == []
        and health(running.url) == (200, 'ok; 1 of 16 visitors\n')
    )
    processes = [
        psutil.Process(running.process.pid),
        *psutil.Process(running.process.pid).children(recursive=True),
    ]
    assert len(processes) > 1 and all(0 not in p.uids() for p in processes), (
        'the server and its kernel run as an ordinary user'
    )
    assert sorted((str(p), p.stat().st_mtime_ns) for p in space.rglob('*')) == before
    page.goto('about:blank')
    for _ in range(100):
        if health(running.url)[1] == 'ok; 0 of 16 visitors\n':
            break
        time.sleep(0.2)
    assert health(running.url)[1] == 'ok; 0 of 16 visitors\n'


def blocked(page):
    for _ in range(100):
        if any('frame-ancestors' in m for m in page.said):
            return True
        page.wait_for_timeout(100)


@browser_only
def test_no_other_sites_frame(browser, running):
    page = framed(browser, 'https://huggingface.co.example.org', running.url)
    assert blocked(page) and page.frame_locator('iframe').get_by_role('button').count() == 0
    shot(page, 'blocked')


@pytest.fixture(scope='module')
def plain(tmp_path_factory):  # `flowerdiff studio`, for one visitor, and no model yet
    root, port = tmp_path_factory.mktemp('plain') / 'w', free_port()
    server = subprocess.Popen(
        [
            sys.executable,
            '-c',
            f'from flowerdiff.apps.serving import serve; serve({str(root)!r}, {port}, visitors=1)',
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert 'http://localhost' in server.stdout.readline()
    yield root, f'http://127.0.0.1:{port}'
    stop(server)


def test_unwell_without_a_model(plain, workspace):
    root, url = plain
    assert health(url) == (503, 'no model in w\n')
    root.mkdir()
    (root / 'model').symlink_to(workspace / 'published/meadow')
    assert well(url) == 'ok; 0 of 1 visitors\n'


@browser_only
def test_one_visitor_too_many_waits_outside(browser, plain):
    first, second = (browser.new_context().new_page() for _ in range(2))
    for p in (first, second):
        p.set_default_timeout(PATIENCE)
    assert first.goto(plain[1]).status == 200
    first.locator('.fd-head').wait_for()
    late = second.goto(plain[1])
    assert (
        late.status == 503
        and late.headers['retry-after']
        and 'frame-ancestors' in late.headers['content-security-policy']
    )
    second.get_by_text('The studio is full').wait_for()
    shot(second, 'full')
    first.goto('about:blank')
    second.locator('.fd-head').wait_for()  # it looks again by itself


@browser_only
def test_the_plain_studio_is_in_nobodys_frame(browser, plain):
    assert blocked(framed(browser, 'https://huggingface.co', plain[1]))


# ---- a model on the Hub


def test_the_model_is_fetched_at_its_commit(workspace, python, open_tmp):
    "What is in the Hub's cache for this commit is served; of another commit there is one line."
    from flowerdiff.apps.hf_space import make_space

    cache = open_tmp / 'hub/models--ada--meadow/snapshots' / COMMIT
    shutil.copytree(workspace / 'published/meadow', cache)
    subprocess.run(['chmod', '-R', 'a+rX', open_tmp / 'hub'])
    for commit, says in ((COMMIT, 'The studio is at'), ('0' * 40, 'ada/meadow@0000')):
        server = Running(
            make_space(f'ada/meadow@{commit}', open_tmp / f'of-{commit[:4]}'),
            python,
            open_tmp / f'home-{commit[:4]}',
            HF_HUB_CACHE=str(open_tmp / 'hub'),
        )
        line = server.told()
        assert line.startswith(says), line + server.process.stdout.read()
        if commit == COMMIT:
            assert well(server.url)
            stop(server.process)
        else:
            assert 'HF_TOKEN' in line and server.process.stdout.read() == '' and server.process.wait(60) == 1


def test_the_card_comes_with_the_model_and_gives_the_examples(tmp_path, monkeypatch):
    "Breaks when the card is not fetched: then a Space of `org/name@commit` shows the garden's examples."
    from flowerdiff.apps import hf_space as space
    from flowerdiff.apps.studio import example_prompts

    words = [f'a portrait of {w}' for w in ('a man', 'a woman', 'a child')]
    (tmp_path / 'README.md').write_text(
        '---\nwidget:\n' + ''.join(f'- text: {w}\n  output:\n    url: a.png\n' for w in words) + '---\n'
    )
    monkeypatch.setattr(
        space,
        'snapshot',
        lambda spec, allow_patterns: tmp_path if 'README.md' in allow_patterns else tmp_path / 'none',
    )
    assert (
        example_prompts(space.room(space.fetch(f'ada/people@{COMMIT}'), tmp_path / 'captions', 'people'))
        == words
    )


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
            and (repo.private, repo.sdk) == (True, 'docker')
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
