"""The whole cloud profile, from pictures to a published model, through papermill and DVC. A spot machine is
reclaimed midway, and no secret is left anywhere.

Amazon is `amazon.py`, the Hub `hub_server.py`: servers on this machine that speak their protocols."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowerdiff.core.files import read_json
from flowerdiff.core.workspace import DEMO

sys.path.insert(0, str(Path(__file__).parent))
from amazon import GROUP, Amazon, can_contain
from conftest import STAGES
from hub_server import Hub

pytest.importorskip(
    'moto.moto_server.threaded_moto_server', reason="moto is not installed: pip install 'moto[server]'"
)
pytestmark = pytest.mark.skipif(not can_contain(), reason='no namespaces here: run as root on Linux')
ROOT = Path(__file__).parents[1]

CANARY = {
    k: f'canary-{i}-{k.lower().replace("_", "-")}'
    for i, k in enumerate(
        [
            'AWS_ACCESS_KEY_ID',
            'AWS_SECRET_ACCESS_KEY',
            'AWS_SESSION_TOKEN',
            'HF_TOKEN',
            'HUGGING_FACE_HUB_TOKEN',
            'MLFLOW_TRACKING_USERNAME',
            'MLFLOW_TRACKING_PASSWORD',
            'MLFLOW_TRACKING_TOKEN',
        ]
    )
}
PASSWORD = 'canary-in-an-address'
HERE = {
    'components.autoencoder': 'garden',
    'components.text_encoder': 'garden',
    'prepare.source': 'garden',
    'prepare.resolution': 64,
    'prepare.split': 'content',
    'caption.captioner': 'auto',
}
SMALL = DEMO | {
    'train.epochs': 10,
    'train.attention': [False, True, True],
    'train.layers': 1,
    'train.attention_head_dim': 8,
    'train.keep_checkpoints': 40,  # all: what is whole in S3 stays whole
    'train.checkpoint_minutes': 1e-4,
    'evaluate.scheduler': 'auto',
    'evaluate.grid_prompts': [],
}


@pytest.fixture(scope='module')
def cloud(tmp_path_factory):
    "Both servers, and a run of the profile between them."
    d = tmp_path_factory.mktemp('cloud')
    amazon = Amazon(d)
    with Hub({CANARY['HF_TOKEN']: dict(user='someone', write=True)}) as hub:
        amazon.client('s3').create_bucket(Bucket='flowers')
        amazon.interrupt, amazon.tear = (
            lambda job: (
                len(
                    {
                        k.split('/')[-2]
                        for k in amazon.keys('flowers', 'meadow/jobs')
                        if k.endswith('state.json') and '/.' not in k
                    }
                )
                > 2
            ),
            True,
        )
        env = (
            {k: v for k, v in os.environ.items() if not k.startswith(('AWS_', 'HF_', 'MLFLOW_'))}
            | amazon.env
            | dict(
                HF_ENDPOINT=hub.url,
                HF_HOME=str(d / 'hf'),
                HF_HUB_DISABLE_XET='1',
                HF_HUB_DISABLE_TELEMETRY='1',
            )
            | CANARY
            | dict(HTTPS_PROXY=f'http://maria:{PASSWORD}@127.0.0.1:9')
        )
        for name in ('AWS_ENDPOINT_URL', 'AWS_ENDPOINT_URL_S3'):
            env[name] = env[name].replace('://', f'://maria:{PASSWORD}@')

        def call(*args, timeout=1500):
            return subprocess.run(
                [
                    sys.executable,
                    '-P',
                    '-c',
                    'import sys; from flowerdiff.pipeline.cli import main; sys.exit(main())',
                    *map(str, args),
                ],
                cwd=d,
                env=env,
                capture_output=True,
                text=True,
                timeout=timeout,
            )

        settings = (
            HERE
            | SMALL
            | {'upload.destination': 's3://flowers/meadow', 'publish.repo_name': 'someone/meadow'}
        )
        done = call(
            'run',
            'meadow',
            '--profile',
            'cloud',
            *[a for k, v in settings.items() for a in ('--set', f'{k}={json.dumps(v)}')],
        )
        (d / 'run.txt').write_text(done.stdout)
        yield dict(amazon=amazon, hub=hub, ws=d / 'meadow', done=done, call=call, env=env, home=d)
    amazon.close()


def test_ten_stages(cloud):
    "Each ran once, in the cloud where the profile says so, interrupted and gone on."
    done, ws = cloud['done'], cloud['ws']
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r'^(\w+) +(?![ .])', done.stdout, re.M)[:10] == STAGES
    (job,), t = cloud['amazon'].jobs.values(), read_json(ws / 'train.json')
    assert (
        job.attempt == 2
        and 0 < t['resumed_from'] < int(job.torn)
        and t['distributed'] == 'zero2'
        and t['processes'] == 2
    )
    assert (
        'SageMaker billed 2 x ml.g4dn.xlarge' in done.stdout
        and read_json(ws / 'upload.json')['store'] == 's3://flowers/meadow'
    )
    assert (
        read_json(ws / 'published.json')['repository'] == 'someone/meadow'
        and (ws / 'model' / 'record.json').exists()
    )


def test_nothing_is_done_twice(cloud):
    jobs, asked = len(cloud['amazon'].jobs), len(cloud['hub'].log)
    again = cloud['call']('run', 'meadow')
    assert again.returncode == 0 and 'nothing to do' in again.stdout, again.stdout + again.stderr
    assert (len(cloud['amazon'].jobs), len(cloud['hub'].log)) == (jobs, asked)


def test_the_published_model_draws(cloud):
    "Downloaded again it is the model of the workspace, for Diffusers and for us."
    code = """
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline
from flowerdiff import Generator


def draw(where):
    pipe = DiffusionPipeline.from_pretrained(where, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    return np.array(pipe('a red rose', num_inference_steps=2, height=64, width=64, generator=rng).images[0])


def ours(where):
    return np.array(Generator.from_pretrained(where)('a red rose', num_inference_steps=2, seed=3)[0])


there, here = draw('someone/meadow'), draw('meadow/model')
assert (there == here).all() and there.std() > 5
assert (ours(f'someone/meadow@{sys.argv[1]}') == ours('meadow/model')).all()
"""
    revision = read_json(cloud['ws'] / 'published.json')['revision']
    done = subprocess.run(
        [sys.executable, '-c', code, revision],
        cwd=cloud['home'],
        env=cloud['env'] | dict(HF_HOME=str(cloud['home'] / 'elsewhere')),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def places(cloud):  # everything that anybody could read afterwards: what it is called, its bytes
    amazon, hub, d = cloud['amazon'], cloud['hub'], cloud['home']
    yield 'the terminal', (cloud['done'].stdout + cloud['done'].stderr).encode()
    for f in d.rglob('*'):
        if f.is_file() and not f.is_symlink():
            yield str(f.relative_to(d)), f.read_bytes()
    for key in amazon.keys('flowers'):
        yield f's3 {key}', amazon.client('s3').get_object(Bucket='flowers', Key=key)['Body'].read()
    for name, job in amazon.jobs.items():
        yield f'job {name}', json.dumps(job.request).encode()
    logs = amazon.client('logs')
    for s in logs.describe_log_streams(logGroupName=GROUP)['logStreams']:
        yield (
            f'log {s["logStreamName"]}',
            json.dumps(
                logs.get_log_events(
                    logGroupName=GROUP, logStreamName=s['logStreamName'], startFromHead=True, limit=10000
                )['events']
            ).encode(),
        )
    for name, repo in hub.repos.items():
        for oid, data in repo.blobs.items():
            yield f'hub {name} {oid}', data
    for oid, data in hub.lfs.items():
        yield f'lfs {oid}', data


def test_no_secret_is_left_anywhere(cloud):
    """The workspace (notebooks, logs, lock files, the tracking store), the bucket, the job, its log and the
    repository. This fails when the environment is written anywhere."""
    looked, found = 0, []
    for what, data in places(cloud):
        looked += 1
        found += [(what, k) for k, v in CANARY.items() if v.encode() in data]
        found += [(what, 'an address')] if PASSWORD.encode() in data else []
    assert looked > 300 and not found, found
    kinds = (
        'mlflow.db',
        'notebooks/05_train.ipynb',
        'work/log/train.log',
        'dvc.lock',
        's3 ',
        'job ',
        'log ',
        'hub ',
        'lfs ',
    )
    names = [w for w, _ in places(cloud)]
    assert all(any(k in n for n in names) for k in kinds), 'it did look there'


def test_every_secret_that_the_code_reads_is_a_canary():
    text = ''.join(p.read_text() for p in (ROOT / 'flowerdiff').rglob('*.py'))
    read = {
        n
        for n in re.findall(r"""['"]([A-Z][A-Z0-9_]{4,})['"]""", text)
        if re.search('TOKEN|SECRET|PASSWORD|ACCESS_KEY', n) and not n.endswith(('_FILE', '_KEYS', '_TOKENS'))
    }
    assert {'AWS_ACCESS_KEY_ID', 'HF_TOKEN'} <= read <= set(CANARY), read - set(CANARY)
