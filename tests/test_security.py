"""No code of a folder or a model runs, nothing asks on the terminal, and no password is left anywhere."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.request import urlopen

import pytest

from flowerdiff.core.errors import UserError
from flowerdiff.core.workspace import preview_workspace

ROOT = Path(__file__).parents[1]
CONFIGS = ['sitecustomize', 'usercustomize', 'jupyter_config', 'jupyter_server_config', 'ipython_config']
SCRIPT = 'import sys\nfrom flowerdiff.pipeline.cli import main\nsys.exit(main())\n'
ADDRESSES = dict(
    MLFLOW_TRACKING_URI='http://maria:canary-mlflow@127.0.0.1:9',
    AWS_ENDPOINT_URL='http://maria:canary-s3@127.0.0.1:9',
    HF_ENDPOINT='http://maria:canary-hub@127.0.0.1:9',
    HTTPS_PROXY='http://maria:canary-proxy@127.0.0.1:9',
)


def plant(folder: Path, marks: Path):
    "Write a module of each name that can be imported here. Each leaves a mark when it runs."
    names = {*sys.stdlib_module_names, *packages_distributions(), *CONFIGS, 'flowerdiff'}
    for name in names:
        if name.isidentifier():
            code = f'open({str(marks)!r}, "a").write({str(folder / name)!r} + "\\n")\n'
            (folder / f'{name}.py').write_text(code)


@pytest.fixture(scope='module')
def attacked(tmp_path_factory, tiny_workspace):
    "A workspace and a current folder full of planted modules: a function that starts the command line."
    home = tmp_path_factory.mktemp('attacked')
    marks = home / 'marks.txt'
    shutil.copytree(tiny_workspace, home / 'here' / 'ws', symlinks=True)
    shutil.copytree(home / 'here/ws/pictures/train', home / 'photos')
    (home / 'bin').mkdir()
    (home / 'bin' / 'flowerdiff').write_text(SCRIPT)  # as pip writes it
    for folder in ('here', 'here/ws', 'here/ws/notebooks', 'photos', 'here/ws/pictures/train'):
        plant(home / folder, marks)
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONSAFEPATH'}
    env |= dict(ADDRESSES, PYTHONPATH=str(ROOT), BROWSER='true', HF_HUB_DISABLE_TELEMETRY='1')
    printed = []

    def call(*words, start=subprocess.run, **options):
        pipes = dict(stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        command = [sys.executable, home / 'bin' / 'flowerdiff', *map(str, words)]
        done = start(command, cwd=home / 'here', env=env, **pipes, **options)
        if start is subprocess.run:
            printed.append(done.stdout)
            assert done.returncode == 0, done.stdout
        assert not marks.exists(), marks.read_text()
        return done

    call.home = home
    call.marks = marks
    call.printed = printed
    return call


def test_no_planted_module_runs(attacked):
    "Training, its torchrun and its follower, DVC, the kernels of two stages, and the short commands."
    sets = ('--set', 'train.epochs=1', '--set', 'train.num_processes=2')
    attacked('run', 'ws', '--from', 'train', '--to', 'promote', '--force', *sets)
    assert (attacked.home / 'here/ws/promote.json').exists()
    attacked('status', 'ws')
    attacked('generate', 'a red rose', '-w', 'ws', '--steps', '1', '--backend', 'torch', '-o', 'rose.png')
    attacked('bench', 'ws', '--steps', '1', '--rounds', '1', '--backend', 'torch')
    attacked('plan', 'new', '--pictures', attacked.home / 'photos')


def test_no_planted_module_runs_in_the_studio(attacked):
    "The server (whose library reads voila.py of the current folder), and its kernel."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    server = attacked('studio', 'ws', '--port', port, start=subprocess.Popen)
    try:
        line = server.stdout.readline()
        assert 'http://localhost' in line, line + server.stdout.read()
        page = urlopen(f'http://127.0.0.1:{port}/', timeout=120).read().decode()
        assert 'widget' in page
    finally:
        server.terminate()
        server.wait(30)
    assert not attacked.marks.exists(), attacked.marks.read_text()


def test_no_password_of_an_address_is_left(attacked):
    "After `test_no_planted_module_runs`: in the workspace, its notebooks and logs, and on the terminal."
    found = [text for text in attacked.printed if 'canary' in text]
    looked = 0
    for path in (attacked.home / 'here' / 'ws').rglob('*'):
        if path.is_file() and path.suffix != '.py':
            looked += 1
            found += [path] if b'canary' in path.read_bytes() else []
    assert looked > 100 and not found, found
    [told] = (attacked.home / 'here/ws/work').glob('train-*/tracking.json')
    assert '***@127.0.0.1:9' in told.read_text()  # the address, without its password


def test_no_password_in_messages_of_stores(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    from flowerdiff.services.model_repo import publish_hub
    from flowerdiff.services.registry import name_champion
    from flowerdiff.services.store import open_store

    for name, value in ADDRESSES.items():
        monkeypatch.setenv(name, value)
    keys = dict(AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b', AWS_MAX_ATTEMPTS='1')
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'README.md').write_text('a model')
    api = HfApi(endpoint=ADDRESSES['HF_ENDPOINT'], token='hf_x')
    for try_it in (
        lambda: open_store('s3://bucket/prefix').read('manifest.json'),
        lambda: open_store('https://maria:canary@example.org/flowers'),
        lambda: publish_hub(tmp_path / 'new', 'owner/name', tmp_path / 'memory.json', api=api),
    ):
        with pytest.raises(UserError) as told:
            try_it()
        assert 'canary' not in str(told.value), told.value
    line = name_champion(preview_workspace(tmp_path / 'ws'), dict(run_id='r'))
    assert '***@127.0.0.1:9' in line and 'canary' not in line, line


@pytest.mark.parametrize(
    'words',
    [
        ['run', 'ws', '--pictures', 'https://maria:canary@example.org/flowers'],
        ['run', 'ws', '--set', 'prepare.source=https://example.org/f.zip?X-Amz-Signature=canary'],
        ['init', 'ws', '--set', 'upload.destination=s3://maria:canary@bucket/flowers'],
        ['init', 'ws', '--profile', 'folder', '--set', 'evaluate.features=http://h/i.pt?access_token=canary'],
        ['download', 'https://maria:canary@example.org/flowers'],
        ['run', 'ws', '--only', 'https://maria:canary@example.org'],
        ['generate', 'a rose', '--model', 'https://maria:canary@example.org/model'],
    ],
)
def test_settings_and_arguments_take_no_password(cli, tmp_path, words):
    "They are refused in one line without it, before anything is written."
    done = cli(*words, cwd=tmp_path)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'canary' not in done.stdout + done.stderr
    assert not any(b'canary' in path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())


def test_an_executed_notebook_and_its_log_hide_passwords(tmp_path):
    code = """
import sys
from flowerdiff.pipeline.execute import HiddenLog, _import_papermill

iorw = _import_papermill().iorw
iorw.papermill_io.write('{"text": "http://maria:canary@h/"}', sys.argv[1] + '/a.ipynb')
with HiddenLog(open(sys.argv[1] + '/a.log', 'wb'), encoding='utf-8') as log:
    log.write('no answer from http://maria:canary@h/')
"""
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, env=env)
    assert (tmp_path / 'a.ipynb').read_text() == '{"text": "http://***@h/"}'
    assert (tmp_path / 'a.log').read_text() == 'no answer from http://***@h/'


# ---- models


EVIL = 'from pathlib import Path\nPath({marks!r}).touch()\nclass Evil: pass\n'


def with_code(folder: Path, marks: Path):
    "Let each configuration of a model offer a class of its own."
    for path in folder.rglob('*.json'):
        if not path.name.endswith('config.json') and path.name != 'model_index.json':
            continue
        config = json.loads(path.read_text())
        classes = ('AutoConfig', 'AutoModel', 'AutoTokenizer', 'AutoProcessor', 'AutoImageProcessor')
        config['auto_map'] = dict.fromkeys(classes, 'evil.Evil') | dict(AutoTokenizer=['evil.Evil'] * 2)
        path.write_text(json.dumps(config))
        (path.parent / 'evil.py').write_text(EVIL.format(marks=str(marks)))


def test_a_model_that_offers_code(tiny_workspace, tmp_path, monkeypatch):
    "It loads with the library's own classes, without a question, and its code does not run."
    import flowerdiff.models.components as components
    from flowerdiff.core.checksums import write_checksums
    from flowerdiff.evaluation.feature_extractors import ClipFeatures
    from flowerdiff.inference.torch_backend import TorchBackend

    def ask(*_):
        raise AssertionError('a question on the terminal')

    monkeypatch.setattr('builtins.input', ask)
    marks = tmp_path / 'marks'
    shutil.copytree(tiny_workspace / 'model', tmp_path / 'model')
    with_code(tmp_path / 'model', marks)
    write_checksums(tmp_path / 'model')
    TorchBackend(tmp_path / 'model')
    components.load_text(str(tmp_path / 'model'))
    components.load_autoencoder(str(tmp_path / 'model'))
    shutil.copytree(ROOT / 'flowerdiff/assets/garden/clip', tmp_path / 'clip')
    with_code(tmp_path / 'clip', marks)
    ClipFeatures(tmp_path / 'clip')
    assert not marks.exists()


def test_a_processor_that_offers_code(tmp_path, monkeypatch):
    "Florence's processor opens Auto classes, which would ask and then run what its folder brings."
    from flowerdiff.models import florence

    monkeypatch.setattr('builtins.input', lambda *_: 'y')
    configs = {
        'config.json': dict(model_type='new'),
        'tokenizer_config.json': dict(tokenizer_class='New'),
        'preprocessor_config.json': dict(image_processor_type='New'),
    }
    for name, config in configs.items():
        (tmp_path / name).write_text(json.dumps(config))
    with_code(tmp_path, tmp_path / 'marks')
    monkeypatch.setattr(florence, 'find_component', lambda *_: tmp_path)
    monkeypatch.setattr(florence, 'check_florence', lambda folder: None)
    monkeypatch.setattr(florence, 'load_strict', lambda *_, **options: None)
    with pytest.raises(UserError, match='custom code'):
        florence.open_florence('a model', device='cpu')
    assert not (tmp_path / 'marks').exists()


def test_a_status_file_names_no_module_to_import(tmp_path, monkeypatch):
    from flowerdiff.core.files import write_json
    from flowerdiff.inference.tensorrt import find_engines

    (tmp_path / 'evil_engines.py').write_text(EVIL.format(marks=str(tmp_path / 'marks')))
    monkeypatch.syspath_prepend(tmp_path)
    record = dict(package='evil_engines', version='1', model='m', gpu='', targets=[''])
    write_json(tmp_path / 'onnx' / 'parity.json', dict(model='m'))
    write_json(tmp_path / 'tensorrt' / 'status.json', dict(sets=dict(a=record)))
    assert find_engines(tmp_path / 'onnx').reason
    assert not (tmp_path / 'marks').exists()


# ---- what the source may not contain


def calls():  # file, name of the function as written, call
    for path in sorted((ROOT / 'flowerdiff').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT), ast.unparse(node.func), node


def test_each_loader_is_safe():
    "No pickle, no Auto class, no YAML with objects, no module named by a file: each kind of loader once."
    forbidden = {
        r'(.*\.)?Auto(Tokenizer|Model|Config|Processor|ImageProcessor|Pipeline)\w*(\..*)?': 'runs their code',
        r'torch\.load|joblib\.load|(c?pickle|dill)\.loads?|.*read_pickle': 'unpickles',
        r'(np|numpy)\.load': 'may unpickle; read safetensors',
        r'yaml\.(load|unsafe_load|full_load)(_all)?': 'may construct objects; use safe_load',
        r'mlflow\.\w+\.load_model|.*pyfunc\.load_model': 'unpickles',
        r'eval|exec|(os\.)?system|input': 'runs text, or waits for a person',
        r'(.*\.)?DiffusionPipeline\.from_pretrained': 'takes classes that a model names',
    }
    found = []
    for path, name, node in calls():
        found += [
            f'{path}: {name} {why}' for pattern, why in forbidden.items() if re.fullmatch(pattern, name)
        ]
        for keyword in node.keywords:
            if keyword.arg in ('trust_remote_code', 'allow_pickle') and ast.unparse(keyword.value) != 'False':
                found.append(f'{path}: {name}({ast.unparse(keyword)})')
    assert not found, found


IMPORTS = {  # of a name that is not a literal: where the name comes from
    'flowerdiff/__init__.py': 'a table in that file',
    'flowerdiff/core/workspace.py': 'the table of the stages',
    'flowerdiff/selftest/parts.py': 'the table of the parts, through the command line of a child process',
    'flowerdiff/inference/tensorrt.py': 'FLAVORS, see `test_a_status_file_names_no_module_to_import`',
}


def test_modules_are_imported_by_known_names():
    names = {str(path) for path, name, _ in calls() if name.endswith(('import_module', '__import__'))}
    assert names == set(IMPORTS)


def test_each_process_is_safe():
    "Each process gets no terminal to ask on, and each Python the environment that hides the current folder."
    found = []
    seen = 0
    for path, name, node in calls():
        if name not in ('subprocess.Popen', 'subprocess.run', 'subprocess.check_output', 'os.system'):
            continue
        seen += 1
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        known = 'stdin' in options
        git_or_driver = path.name in ('fingerprints.py', 'tensorrt.py')
        safe = 'safe_environment(' in options.get('env', '') or path.name == 'pipeline.py'
        if not known or not (git_or_driver or safe):
            found.append(f'{path}: {ast.unparse(node)[:100]}')
    assert seen >= 6 and not found, found
    pipeline = (ROOT / 'flowerdiff/pipeline/pipeline.py').read_text()
    assert 'env = safe_environment() | run_variable(' in pipeline
