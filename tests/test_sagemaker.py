"""Training at SageMaker: the real SDK, SageMaker's own scripts in the containers, two hosts, one
interrupted. Amazon is `amazon.py`."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from flowerdiff.cloud import jobs, permissions, sagemaker
from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json
from flowerdiff.core.fingerprints import file_sha256
from flowerdiff.core.workspace import demo_workspace, open_workspace
from flowerdiff.services.store import open_store
from flowerdiff.services.tracking import read_events
from flowerdiff.stages.train import run
from flowerdiff.training.worker import run_fingerprint

sys.path.insert(0, str(Path(__file__).parent))
from amazon import ROLE, Amazon, can_contain

pytest.importorskip(
    'moto.moto_server.threaded_moto_server', reason="moto is not installed: pip install 'moto[server]'"
)
contained = pytest.mark.skipif(not can_contain(), reason='no namespaces here: run as root on Linux')
STEPS = {
    'train.epochs': 10,
    'train.distributed': 'zero2',
    'train.checkpoint_minutes': 1e-4,
    'train.keep_checkpoints': 40,  # all: what is whole in S3 stays whole
    'train.threads': 1,
    'train.samples_every': 20,
    'train.validate_every': 20,
}  # 40 steps


@pytest.fixture(scope='module')
def amazon(tmp_path_factory):
    a = Amazon(tmp_path_factory.mktemp('amazon'))
    a.client('s3').create_bucket(Bucket='flowers')
    yield a
    a.close()


@pytest.fixture(autouse=True)
def person(amazon, monkeypatch):  # what is in the environment
    for k in [k for k in os.environ if k.startswith(('AWS_', 'SAGEMAKER'))]:
        monkeypatch.delenv(k)
    for k, v in amazon.env.items():
        monkeypatch.setenv(k, v)
    amazon.interrupt, amazon.tear, amazon.refuse, amazon.container = (lambda job: False), False, None, None


def workspace(folder, prefix, **changes):
    "Encoded pictures, and settings that train them in the cloud."
    demo_workspace('encode', folder)
    return open_workspace(
        folder,
        None,
        STEPS
        | {'train.where': 'sagemaker', 'upload.destination': f's3://flowers/{prefix}'}
        | {k.replace('__', '.'): v for k, v in changes.items()},
    )


def folder_of(ws):
    return ws.work_dir('train', run_fingerprint(ws))


def notes(ws):
    return [e['text'] for e in read_events(folder_of(ws) / 'events.jsonl')[0] if e['event'] == 'note']


def weights(ws):
    return {
        p.relative_to(ws.candidate).as_posix(): file_sha256(p)
        for p in sorted(ws.candidate.rglob('*.safetensors'))
    }


@contained
def test_a_job_that_was_interrupted_is_the_run_that_was_not(amazon, tmp_path):
    """Two hosts under torchrun and ZeRO-2; one is taken away while a checkpoint is being copied, the
    process that follows is killed; the model is byte for byte the one that two processes here make.
    Skipping the checkpoint, a shuffled order or the torn checkpoint would change a byte."""
    at_home = workspace(tmp_path / 'home', 'home', train__where='here', train__num_processes=2)
    run(at_home.root)
    ws, jobs_before = workspace(tmp_path / 'meadow', 'meadow'), len(amazon.jobs)

    def interrupt(job):
        "Are two whole checkpoints in S3? The newest will be torn."
        roots = amazon.folder.glob(f'{job.name}-1-*')
        walks = [files for root in roots for _, _, files in os.walk(root)]  # folders come and go meanwhile
        size = max((len(files) for files in walks if 'state.json' in files), default=1)
        keys = [k for k in amazon.keys('flowers', 'meadow/jobs') if '/.' not in k]
        folders = [k.removesuffix('state.json') for k in keys if k.endswith('/state.json')]
        return sum(sum(k.startswith(folder) for k in keys) >= size for folder in folders) > 1

    amazon.interrupt, amazon.tear = interrupt, True

    died = []

    def follow():
        with pytest.raises(RuntimeError) as e:
            run(ws.root)
        died.append(str(e.value))

    first = threading.Thread(target=follow, daemon=True)
    first.start()
    until(
        lambda: any(e['event'] == 'start' for e in read_events(folder_of(ws) / 'events.jsonl')[0]), 600
    )  # it trains; who follows it dies
    subprocess.run(['pkill', '-9', '-f', f'flowerdiff.cloud.jobs {ws.root}'], check=True)
    first.join(120)
    assert 'train.log; the job goes on' in died[0], died
    open_workspace(ws.root, None, {'sagemaker.instance_count': 5})  # for the next job, not for this one
    result = run(ws.root)

    (job,), t = (
        [j for j in amazon.jobs.values() if 'meadow' in json.dumps(j.request)],
        read_json(ws.root / 'train.json'),
    )
    assert job.attempt == 2 and 0 < t['resumed_from'] < int(job.torn), (
        'the torn checkpoint does not count, the one before does'
    )
    assert (
        weights(ws) == weights(at_home)
        and t['validation'] == read_json(at_home.root / 'train.json')['validation']
        and t['steps'] == 40
    )
    assert (
        t['processes'] == 2
        and t['distributed'] == 'zero2'
        and result.samples
        and 'SageMaker billed 2 x ml.g4dn.xlarge' in result.summary
    )
    told = notes(ws)
    for said in (
        'at most 12 machine hours, $8.83',
        'started flowerdiff-train-',
        'found flowerdiff-train-',
        'billed',
    ):
        assert [n for n in told if said in n], (said, told)
    events = read_events(folder_of(ws) / 'events.jsonl')[0]
    assert [e['step'] for e in events if e['event'] == 'start'] == [0, t['resumed_from']] and events[-1][
        'event'
    ] == 'done', 'each event once'
    log = (folder_of(ws) / 'containers.log').read_text()
    assert 'algo-1: ' in log and 'algo-2: ' in log and 'Running Torchrun Driver' in log
    assert not amazon.keys(
        'flowers', f'meadow/jobs/{sagemaker.job_tag(folder_of(ws).name, "s3://flowers/meadow")}/checkpoints'
    ), 'the checkpoints have served'
    metrics_in_mlflow(ws)
    the_request(job.request)
    again = run(ws.root)  # such as with --force: the model is fetched once more
    assert (
        len(amazon.jobs) == jobs_before + 1
        and again.summary == result.summary
        and weights(ws) == weights(at_home)
    )


def metrics_in_mlflow(ws):  # of rank 0, both sides of the interruption
    from flowerdiff.services.tracking import mlflow_client

    client = mlflow_client(ws.root)

    def losses():
        found = client.search_runs([e.experiment_id for e in client.search_experiments()])
        return [m.step for r in found for m in client.get_metric_history(r.info.run_id, 'train/loss')]

    until(lambda: max(losses(), default=0) == 40, 300)
    assert min(losses()) < 8


def the_request(r):  # what Amazon was asked for
    assert (
        r['ResourceConfig'] == dict(InstanceType='ml.g4dn.xlarge', InstanceCount=2, VolumeSizeInGB=50)
        and r['EnableManagedSpotTraining']
        and r['StoppingCondition'] == dict(MaxRuntimeInSeconds=6 * 3600, MaxWaitTimeInSeconds=12 * 3600)
    )
    assert (
        r['RoleArn'] == ROLE
        and r['CheckpointConfig']['LocalPath'] == '/opt/ml/checkpoints'
        and 'amzn2023' in r['AlgorithmSpecification']['TrainingImage']
    )
    (data,) = [c for c in r['InputDataConfig'] if c['ChannelName'] == 'data']
    assert data['DataSource']['S3DataSource']['S3DataType'] == 'ManifestFile'
    assert 'testing' not in json.dumps(r), 'no credential is in what anyone with DescribeTrainingJob reads'


def until(true, seconds):  # wait for something
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it never came'
        time.sleep(0.2)


@contained
def test_a_mistake_in_the_container_is_one_line(amazon, tmp_path):
    """An object that was damaged in the bucket: the container finds it, the line comes home, nothing is
    half made."""
    ws = workspace(tmp_path / 'meadow', 'damaged', sagemaker__instance_count=1, sagemaker__spot=False)
    store, sent = open_store(ws.settings.upload.destination), sagemaker.send_data

    def send(*args):
        files = sent(*args)
        f = next(f for f in files if f['path'].endswith('.bin'))
        store.write(sagemaker.object_key(f['sha256']), b'x' * f['size'])
        return files

    with patch.object(sagemaker, 'send_data', send), patch.object(jobs, 'start_follower'):
        assert jobs.run_job(str(ws.root), str(folder_of(ws)), poll=0.2) == 2
    last = read_events(folder_of(ws) / 'events.jsonl')[0][-1]
    assert (
        last['mistake']
        and "is damaged among the job's data" in last['message']
        and '\n' not in last['message']
    )
    assert not ws.candidate.exists() and not (ws.root / 'train.json').exists()
    assert not [
        c
        for c in amazon.jobs[max(amazon.jobs)].request
        if c == 'EnableManagedSpotTraining' and amazon.jobs[max(amazon.jobs)].request[c]
    ]


def line_of(ws):  # what the stage says
    with pytest.raises(UserError) as e:
        run(ws.root)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_what_is_wrong_at_amazon_is_one_line(amazon, tmp_path, monkeypatch):
    "Quota, permission, role, region, network, credentials: each with what to do, and no job."
    ws, jobs_before = workspace(tmp_path / 'meadow', 'lines'), len(amazon.jobs)
    for refuse, words in (
        (
            (
                'ResourceLimitExceeded',
                "The account-level service limit 'ml.g4dn.xlarge for spot training job usage' is 0 Instances",
            ),
            ('Service Quotas', 'is 0 Instances'),
        ),
        (
            ('AccessDeniedException', 'User is not authorized to perform: sagemaker:CreateTrainingJob'),
            ('not allowed', 'sagemaker:CreateTrainingJob'),
        ),
        (
            ('ValidationException', 'Could not assume role arn:aws:iam::123456789012:role/flowers'),
            ('sagemaker.role: ', 'Could not assume'),
        ),
        (
            (
                'ValidationException',
                'No S3 objects found under "s3://flowers/x". Ensure that the role "arn:aws:iam::1:role/x" '
                'has "s3:ListBucket"',
            ),
            ('SageMaker, us-east-1: ', 'No S3 objects found under'),
        ),
    ):
        amazon.refuse = refuse
        said = line_of(ws)
        assert all(w in said for w in words), said
        assert said.startswith('sagemaker.role') == (words[0] == 'sagemaker.role: '), said
    amazon.refuse = None
    other = workspace(tmp_path / 'clearing', 'lines', sagemaker__instance_type='ml.trn1.2xlarge')
    assert 'for Trainium instances' in line_of(other)  # the SDK's own ValueError
    monkeypatch.delenv('SAGEMAKER_ROLE')
    assert 'SAGEMAKER_ROLE' in line_of(ws)
    monkeypatch.delenv('AWS_DEFAULT_REGION')
    assert 'AWS_DEFAULT_REGION' in line_of(ws)
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
    assert 'no answer in the region us-east-1' in line_of(ws)
    for k in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
        monkeypatch.delenv(k)
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', '/nowhere')
    monkeypatch.setenv('AWS_CONFIG_FILE', '/nowhere')
    assert 'no AWS credentials' in line_of(ws)
    assert len(amazon.jobs) == jobs_before


def test_the_network_keys_and_tags_of_a_job_reach_amazon(amazon, tmp_path):
    "As the SDK sends them; without them the request has none."
    key = 'arn:aws:kms:us-east-1:123456789012:key/0a1b'
    own = dict(
        sagemaker__subnets=['subnet-0a1b2c3d'],
        sagemaker__security_groups=['sg-0a1b2c3d'],
        sagemaker__volume_key=key,
        sagemaker__output_key=f'{key}c',
        sagemaker__tags=['project=flowers', 'owner=maria'],
    )
    amazon.refuse = ('ResourceLimitExceeded', 'no more machines')
    requests = {}
    for name, changes in dict(plain={}, own=own).items():
        said = line_of(workspace(tmp_path / name, f'network-{name}', **changes))
        assert 'no more machines' in said, said
        requests[name] = amazon.refused
    plain, own = requests['plain'], requests['own']

    assert own['VpcConfig'] == dict(SecurityGroupIds=['sg-0a1b2c3d'], Subnets=['subnet-0a1b2c3d'])
    assert own['ResourceConfig']['VolumeKmsKeyId'] == key
    assert own['OutputDataConfig']['KmsKeyId'] == f'{key}c'
    assert own['Tags'] == [dict(Key='project', Value='flowers'), dict(Key='owner', Value='maria')]
    assert not {'VpcConfig', 'Tags'} & set(plain)
    assert not {'VolumeKmsKeyId', 'KmsKeyId'} & {*plain['ResourceConfig'], *plain['OutputDataConfig']}


def test_a_run_that_could_not_train_does_not_begin(amazon, tmp_path, monkeypatch, cli):
    """Before pictures are drawn: the role, and a bucket that answers. Without the check the first line
    would be prepare's."""

    def go():
        settings = ('train.where=sagemaker', 'upload.destination=s3://nobodys/flowers', 'prepare.count=20')
        return cli('run', tmp_path / 'meadow', *[arg for setting in settings for arg in ('--set', setting)])

    done = go()
    assert (
        done.returncode == 2
        and 'no such bucket' in done.stderr
        and not done.stdout
        and not (tmp_path / 'meadow' / 'pictures').exists()
    ), done
    monkeypatch.delenv('SAGEMAKER_ROLE')
    done = go()
    assert done.returncode == 2 and 'SAGEMAKER_ROLE' in done.stderr and 'Traceback' not in done.stderr


def test_a_bucket_is_needed(tmp_path):
    with pytest.raises(UserError, match=r'upload\.destination to s3://'):
        open_workspace(tmp_path / 'meadow', 'garden', {'train.where': 'sagemaker'})
    with pytest.raises(UserError, match='max_wait_hours'):
        open_workspace(tmp_path / 'meadow', 'garden', {'sagemaker.max_hours': 20})


@contained
def test_a_person_is_asked_before_a_job_is_stopped(amazon, tmp_path):
    """Ctrl-C: a yes stops the job, anything else lets it go on; a stopped job says what to do and is
    followed by another."""
    ws = workspace(tmp_path / 'meadow', 'asked', sagemaker__instance_count=1)
    amazon.container = 'sleep 600'

    def attend():
        return jobs.run_job(str(ws.root), str(folder_of(ws)), 0.2)

    with patch.object(jobs, 'start_follower'), patch.object(jobs, 'can_ask', return_value=True):
        thread = threading.Thread(target=attend, daemon=True)
        thread.start()
        until(lambda: any('SageMaker: training' in n for n in notes(ws)), 300)
        name = jobs.job_of(ws)[1]['TrainingJobName']
        before = len(amazon.jobs)
        assert 'goes on' in jobs.ask_to_stop(ws, lambda question: 'n') and not amazon.jobs[name].asked_to_stop
        assert (
            'is being stopped' in jobs.ask_to_stop(ws, lambda question: 'y')
            and amazon.jobs[name].asked_to_stop
        )
        thread.join(300)
        assert not thread.is_alive()
        assert 'it was stopped; run again' in read_events(folder_of(ws) / 'events.jsonl')[0][-1]['message']
        assert jobs.ask_to_stop(ws, lambda question: 'y') == ''
        amazon.container = 'echo "RuntimeError: the flowers wilted"; exit 3'
        assert attend() == 2
    assert len(amazon.jobs) == before + 1
    said = read_events(folder_of(ws) / 'events.jsonl')[0][-1]['message']
    assert 'RuntimeError: the flowers wilted' in said and 'containers.log' in said


@contained
def test_the_policy_allows_what_was_asked_and_no_more(amazon):
    """Of the tests before: every request is in the tutorial's policy, and what is in it was needed. A
    right too many or too few fails."""
    rights = {
        a
        for s in permissions.person_policy('s3://flowers/meadow', ROLE)['Statement']
        for a in s['Action']
        if a.split(':')[0] in ('sagemaker', 'logs', 'pricing')
    }
    asked = set(amazon.asked)
    if 'sagemaker:StopTrainingJob' not in asked:
        pytest.skip('the tests before were not run')
    assert asked == rights
