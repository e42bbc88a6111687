"The command line as you use it: how fast it answers, and how it reports errors."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def cpu(*code):
    "Return the CPU seconds of a Python process, the best of three."
    took = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        took.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return min(took)


def one_line(p, status=2):
    "Check that a process ended with one line about an error. Returns the line."
    assert p.returncode == status, p.stdout + p.stderr
    text = p.stderr.strip()
    assert text and '\n' not in text and 'Traceback' not in text, text
    return text


def test_import_and_help_are_fast():
    assert cpu('-c', 'import flowerdiff') < 0.3
    assert cpu('-m', 'flowerdiff.pipeline.cli', '--help') < 0.7


def test_import_loads_nothing_heavy():
    names = 'torch diffusers transformers mlflow matplotlib pandas numpy pydantic'
    heavy = f'[m for m in {names.split()} if m in sys.modules]'
    code = f'import sys, flowerdiff, flowerdiff.pipeline.cli; print({heavy})'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_light_modules_stay_light():
    names = 'torch diffusers transformers mlflow matplotlib pandas sklearn datasets torchmetrics'
    light = (
        'core.profiles core.workspace garden.garden data.images pipeline.pipeline pipeline.cli '
        'services.store evaluation.report'
    )
    imports = '; '.join(f'import flowerdiff.{module}' for module in light.split())
    code = f'import sys; {imports}; print([m for m in {names.split()} if m in sys.modules])'
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.stdout.strip() == '[]', p.stdout + p.stderr


def test_help_shows_examples_of_every_command(cli):
    text = cli('--help').stdout
    for c in ('run', 'status', 'generate', 'studio', 'init', 'doctor'):
        assert re.search(rf'^    {c} ', text, re.M), c
        assert 'usage: flowerdiff ' + c in cli(c, '--help').stdout
    assert 'a red rose under a blue sky' in text


def test_version(cli):
    import configparser

    c = configparser.ConfigParser()
    c.read(ROOT / 'settings.ini')
    assert cli('--version').stdout.strip() == f'flowerdiff {c["DEFAULT"]["version"]}'


@pytest.mark.parametrize(
    'setting,says',
    [
        ('train.epoch=3', 'train.epoch is not a setting; did you mean train.epochs?'),
        ('trian.lr=3', 'did you mean train.lr?'),
        ('train.batch_size=0', 'train.batch_size must be at least 1'),
        ('train.batch_size=many', 'train.batch_size must be a whole number'),
        ('train.mirror=7', 'train.mirror must be true or false'),
        ('train.batch_size=true', 'train.batch_size must not be true or false'),
        ('caption.captioner=magic', 'must be one of auto, given, attributes, labels'),
        ('prepare.resolution=60', 'must be a multiple of 8'),
        ('train.attention=[true]', 'give one per level'),
        ('train={a: 1}', 'train is a group of settings; name one'),
        ('nonsense', 'write key=value'),
        ('train.channels=[1', 'not YAML'),
        ('components.text_encoder=openai/clip', 'nor pinned to a commit'),
    ],
)
def test_bad_settings_stop_before_any_work(cli, tmp_path, setting, says):
    assert says in one_line(cli('run', tmp_path / 'w', '--set', setting))
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    'text,says',
    [
        (
            'profile: garden\ntrain:\n  batch_size: 0\n',
            'train.batch_size must be at least 1 (params.yaml line 3 has 0)',
        ),
        ('profile: garden\ntrain:\n  lr: 1\n  lr: 2\n', 'params.yaml line 4'),
        ('profile: garden\n  train: [\n', 'is not YAML'),
        ('just words', 'holds no settings'),
        ('', 'holds no settings'),
        ('seed: 1\n', 'profile is missing'),
        ('profile: garden\ncolour: red\n', 'colour is not a setting'),
    ],
)
def test_bad_params_file_names_the_line(cli, tmp_path, text, says):
    (tmp_path / 'params.yaml').write_text(text)
    assert says in one_line(cli('run', tmp_path))
    assert (tmp_path / 'params.yaml').read_text() == text


def test_params_file_that_is_not_text(cli, tmp_path):
    (tmp_path / 'params.yaml').write_bytes(b'\xff\xfe\x00profile')
    assert 'UTF-8' in one_line(cli('run', tmp_path))


def test_workspace_of_another_profile(cli, tmp_path):
    assert cli('init', tmp_path / 'w').returncode == 0
    assert 'is a workspace of the profile garden, not folder' in one_line(
        cli('run', tmp_path / 'w', '--profile', 'folder')
    )
    assert 'gardn is not a profile' in one_line(cli('run', tmp_path / 'v', '--profile', 'gardn'))


def test_workspace_that_is_a_file_or_a_folder_of_other_things(cli, tmp_path):
    (tmp_path / 'notes').write_text('x')
    assert 'is a file' in one_line(cli('run', tmp_path / 'notes'))
    assert 'no params.yaml' in one_line(cli('run', tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ['notes']


def test_pictures(cli, tmp_path):
    assert 'is not a folder' in one_line(cli('run', tmp_path / 'w', '--pictures', tmp_path / 'none'))
    assert not (tmp_path / 'w').exists()
    assert 'give --pictures DIR' in one_line(cli('run', tmp_path / 'w', '--profile', 'folder'))


def give_up_root_rights():
    "Drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root may write and read anything."
    import ctypes

    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def test_read_only_workspace(cli, tmp_path):
    assert cli('init', tmp_path / 'w').returncode == 0
    os.chmod(tmp_path / 'w', 0o555)
    p = cli('run', tmp_path / 'w', preexec_fn=give_up_root_rights)
    assert re.search(r'/w/\S+: may not be written or read; change its permissions', one_line(p))
    assert sorted(p.name for p in (tmp_path / 'w').iterdir()) == ['params.yaml']


def test_full_disk(cli, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', disk], capture_output=True
    ).returncode:
        pytest.skip('no right to make a small disk here')
    try:
        message = one_line(cli('run', disk / 'w'))
        assert '0.0 MB free and the first three stages need about' in message
        assert not (disk / 'w').exists()
        assert cli('init', disk / 'w').returncode == 0
        assert 'the disk is full' in one_line(cli('run', disk / 'w'))  # an existing workspace is not checked
    finally:
        subprocess.run(['umount', disk])


@pytest.mark.parametrize(
    'args,says',
    [
        (['generate'], 'holds no model'),
        (['genrate', 'x'], 'did you mean generate?'),
        (['generate', 'x', '--n', '2'], 'unrecognized'),
        (['generate', 'x', '--size', 'big'], 'is not a size'),
        (['generate', 'x', '-n', '0'], 'at least 1'),
        (['generate', 'x', '--steps', 'ten'], 'whole number'),
        (['generate', 'x', '--seed', '-1'], 'at least 0'),
        (['drow'], "'drow' is not a command"),
        (['run', '--form', 'train'], 'unrecognized'),
        (['run', 'w', '--from', 'training'], 'training is not a stage'),
        (['run', 'w', '--only', 'x'], 'x is not a stage'),
        (['bench', 'w', '--steps', '4,x'], 'whole number'),
        (['bench', 'nowhere'], 'not there'),
        (['bench', '--rounds', '0'], 'at least 1'),
        (['generate', 'a rose', '-w', 'nowhere'], 'holds no model'),
        (['generate', 'a rose', '-m', 'nowhere'], 'not there'),
        (
            ['generate', 'a rose', '-m', 'no-such-org/no-such-model'],
            'give a folder',
        ),
        (['status', 'nowhere'], 'is not a workspace'),
        (['rollback', 'nowhere'], 'is not a workspace'),
        (['studio', 'nowhere'], 'holds no model yet; `flowerdiff run nowhere` trains one'),
        (['studio', '--port', '99999'], 'is not a port'),
        (['studio', '--port', 'x'], 'is not a port'),
        (['space', 'nowhere'], 'not published'),
        (['compare', 'nowhere', 'nowhere'], 'holds no trained run'),
        (['download', 'nowhere'], 'holds no set'),
        (['plan', 'notes'], 'is a file'),
        (['run', 'notes/w'], 'lies in a file'),
        (['init', 'notes'], 'is a file'),
        (['status', 'notes'], 'is a file'),
        (['rollback', 'notes'], 'is a file'),
        (['sweep', 'notes', '--set', 'train.lr=1,2'], 'is a file'),
        (['run', 'a' * 300], 'the name is too long'),
    ],
)
def test_bad_arguments(cli, tmp_path, args, says):
    (tmp_path / 'notes').write_text('x')
    assert says in one_line(cli(*args, cwd=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ['notes']


@pytest.mark.parametrize('command', ['run', 'status', 'rollback', 'init', 'plan', 'studio', 'bench'])
def test_workspace_without_permission(cli, tmp_path, command):
    root = tmp_path / 'w'
    root.mkdir()
    (root / 'params.yaml').write_text('profile: garden\n')
    root.chmod(0)
    try:
        message = one_line(cli(command, root, preexec_fn=give_up_root_rights))
    finally:
        root.chmod(0o755)
    assert 'may not be written or read' in message
    assert os.listdir(root) == ['params.yaml']


def test_stage_notebooks_say_what_to_do_without_a_workspace(tmp_path):
    "The run cells of all ten, in a folder that is no workspace: one line each, and nothing is left."
    from flowerdiff.core.workspace import STAGES

    code = """
import importlib, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell()
for name in sys.argv[1:]:
    shell.run_cell(f'from flowerdiff.stages.{name} import run\\nrun(".")')
"""
    names = list(STAGES)
    env = {**os.environ, 'HOME': str(tmp_path), 'IPYTHONDIR': str(tmp_path / '.ipython')}
    folder = tmp_path / 'empty'
    folder.mkdir()
    p = subprocess.run(
        [sys.executable, '-c', code, *names], cwd=folder, env=env, capture_output=True, text=True
    )
    lines = p.stdout.strip().splitlines()
    assert [line.split(':')[1].strip() for line in lines] == names, p.stdout + p.stderr
    assert all(f'{folder} is not a workspace' in line for line in lines)
    assert os.listdir(folder) == []


def test_init_status_and_settings_inside_the_workspace(cli, tmp_path):
    assert cli('init', 'mine', '--set', 'train.epochs=3', cwd=tmp_path).returncode == 0
    text = (tmp_path / 'mine' / 'params.yaml').read_text()
    assert re.search(r'epochs: 3 +# Passes', text)
    p = cli('status', cwd=tmp_path / 'mine')
    assert p.returncode == 0 and p.stdout.count('never run') == 10


def test_profiles_spell_out_every_setting():
    from ruamel.yaml import YAML

    from flowerdiff.core.profiles import load_profile, profiles
    from flowerdiff.core.setting_errors import setting_fields

    for name, path in profiles().items():
        data = YAML(typ='safe').load(path)
        sections = {section: values for section, values in data.items() if isinstance(values, dict)}
        keys = {f'{section}.{key}' for section, values in sections.items() for key in values}
        assert keys | {'profile', 'seed'} == set(setting_fields()), name
        assert load_profile(name).profile == name


def test_doctor(cli, tmp_path):
    p = cli('doctor', cwd=tmp_path)
    assert p.returncode == 0
    for word in ('cores', 'memory', 'disk', 'torch', 'GPU', 'prepare', 'train', 'tensorrt', 'publish'):
        assert re.search(rf'^{word} ', p.stdout, re.M), word


def test_generate_draws_and_numbers(cli, tiny_workspace, tmp_path):
    from PIL import Image

    p = cli(
        'generate',
        'a red rose under a blue sky',
        '-w',
        tiny_workspace,
        '-n',
        2,
        '--seed',
        7,
        '--steps',
        2,
        '-o',
        'rose.png',
        cwd=tmp_path,
    )
    assert p.stdout.split() == ['rose-1.png', 'rose-2.png'], p.stderr
    p = cli(
        'generate',
        'a red rose under a blue sky',
        '-w',
        tiny_workspace,
        '--seed',
        8,
        '--steps',
        2,
        cwd=tmp_path,
    )
    assert p.stdout.split() == ['a-red-rose-under-a-blue-sky.png'], p.stderr
    same = [
        Image.open(tmp_path / n).convert('RGB').tobytes()
        for n in ('rose-2.png', 'a-red-rose-under-a-blue-sky.png')
    ]
    assert same[0] == same[1]  # picture i of seed s is picture 0 of seed s + i
    for args, says in (
        (['x', '-o', 'rose.txt'], 'end it in .png'),
        ([], 'the prompt is missing'),
        (['a', 'red', 'rose'], 'write it in quotes: "a red rose"'),
        (['x', '--prompts-file', 'none.txt'], 'cannot be read as text'),
        (['x', '--like', 'none.png'], 'is not there'),
        (['x', '-n', '2', '-o', '-'], 'one picture to the standard output'),
    ):
        assert says in one_line(cli('generate', *args, '-w', tiny_workspace, cwd=tmp_path)), args


def test_generate_takes_settings_from_files_and_overwrites_nothing(cli, tiny_workspace, tmp_path):
    from PIL import Image

    def pixels(name):
        return Image.open(tmp_path / name).convert('RGB').tobytes()

    settings = ['--seed', 7, '--steps', 2, '--guidance', 3, '--sampler', 'ddim', '--size', '32x48']
    first = cli(
        'generate', 'a red rose', '-w', tiny_workspace, *settings, '-o', 'rose.png', '--json', cwd=tmp_path
    )
    [row] = json.loads(first.stdout)
    assert (row['path'], row['prompt'], row['seed'], row['scheduler']) == (
        'rose.png',
        'a red rose',
        7,
        'ddim',
    )
    again = cli('generate', '--like', 'rose.png', '-w', tiny_workspace, '-o', 'rose.png', cwd=tmp_path)
    assert again.stdout.split() == ['rose-1.png'], again.stderr
    assert pixels('rose-1.png') == pixels('rose.png')
    (tmp_path / 'prompts.txt').write_text('the sky\n\n# not this\na rose\n', encoding='utf-8')
    (tmp_path / 'out').mkdir()
    line = [
        '--prompts-file',
        'prompts.txt',
        '--steps',
        1,
        '--image',
        'rose.png',
        '--format',
        'webp',
        '-o',
        'out',
    ]
    several = cli('generate', *line, '-w', tiny_workspace, cwd=tmp_path)
    assert several.stdout.split() == ['out/the-sky.webp', 'out/a-rose.webp'], several.stderr
