"""Amazon on this machine, for tests. moto's server keeps buckets, roles, logs and training jobs. A proxy in
front of it runs the jobs.

What SageMaker does, from its documentation and its SDK: it copies each channel (S3Prefix, ManifestFile)
and the checkpoints to every host, writes /opt/ml/input/config, and runs the entry point of the request in
a container on each host. What appears in /opt/ml/checkpoints is copied to S3 from time to time, file by
file, and what is removed here is removed there. When a spot machine is reclaimed, all containers are
killed and new ones start. At the end /opt/ml/model of all hosts becomes model.tar.gz. Here a container is
a namespace of its own (mounts, processes, host name) with /opt/ml and /etc/hosts.

Not covered: images (the Python of the tests runs), IAM (every request is allowed), networks (both hosts
are 127.0.0.1), streaming modes, SIGTERM before an interruption.
"""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEYS = dict(AWS_ACCESS_KEY_ID='testing', AWS_SECRET_ACCESS_KEY='testing', AWS_DEFAULT_REGION='us-east-1')
ROLE = 'arn:aws:iam::123456789012:role/flowers'
GROUP = '/aws/sagemaker/TrainingJobs'


def can_contain() -> bool:  # may we make namespaces?
    return (
        subprocess.run(['unshare', '-m', '-u', '-p', '-f', 'true'], capture_output=True).returncode == 0
        if shutil.which('unshare')
        else False
    )


class Amazon:
    "`env` is what a person's environment would hold; `jobs` are those that were started."

    def __init__(self, folder: Path):
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        self.folder, self.jobs, self.asked, self.refuse = Path(folder), {}, [], None
        self.refused = None  # the request that `refuse` answered
        self.interrupt = lambda job: (
            False
        )  # (job) -> are the spot machines taken back now? asked while the first containers run
        self.tear = False  # was the machine taken while a checkpoint was being copied?
        self.container = None  # a command instead of the request's
        self.moto = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
        self.moto.start()
        self.moto_at = '{}:{}'.format(*self.moto.get_host_and_port())
        self.proxy = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Handler,), dict(amazon=self)))
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.env = dict(
            KEYS,
            AWS_ENDPOINT_URL=f'http://127.0.0.1:{self.proxy.server_port}',
            AWS_ENDPOINT_URL_S3=f'http://{self.moto_at}',
            AWS_EC2_METADATA_DISABLED='true',
            SAGEMAKER_ROLE=ROLE,
        )

    def client(self, name):
        import boto3

        return boto3.client(
            name,
            endpoint_url=f'http://{self.moto_at}',
            aws_access_key_id='testing',
            aws_secret_access_key='testing',
            region_name='us-east-1',
        )

    def keys(self, bucket, prefix=''):
        return [
            o['Key']
            for page in self.client('s3')
            .get_paginator('list_objects_v2')
            .paginate(Bucket=bucket, Prefix=prefix)
            for o in page.get('Contents', [])
        ]

    def close(self):
        for job in self.jobs.values():
            job.kill()
        for job in self.jobs.values():
            job.thread.join(120)
        self.proxy.shutdown()
        self.moto.stop()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_POST(self):
        a, body = self.amazon, self.rfile.read(int(self.headers.get('Content-Length') or 0))
        what = self.headers.get('X-Amz-Target', '').split('.')[-1]
        if what:
            a.asked.append(
                '{}:{}'.format(
                    {'SageMaker': 'sagemaker', 'Logs_20140328': 'logs', 'AWSPriceListService': 'pricing'}.get(
                        service := self.headers['X-Amz-Target'].split('.')[0], service
                    ),
                    what,
                )
            )  # as IAM writes it
        if what == 'CreateTrainingJob' and a.refuse:
            a.refused = json.loads(body)
            return self.answer(400, dict(__type=a.refuse[0], message=a.refuse[1]))
        if what == 'GetProducts':
            return self.answer(
                200,
                dict(
                    PriceList=[
                        json.dumps(
                            dict(
                                terms=dict(
                                    OnDemand=dict(
                                        a=dict(priceDimensions=dict(b=dict(pricePerUnit=dict(USD='0.736'))))
                                    )
                                )
                            )
                        )
                    ]
                ),
            )
        if what == 'StopTrainingJob':
            a.jobs[json.loads(body)['TrainingJobName']].stop()
            return self.answer(200, {})
        if b'SimulatePrincipalPolicy' in body:
            return self.send(
                403,
                [('Content-Type', 'text/xml')],
                b'<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>iam:SimulatePrincipalPolicy</Message></Error></ErrorResponse>',
            )
        status, headers, data = self.pass_on(body)
        if what == 'CreateTrainingJob' and status == 200:
            request = json.loads(body)
            a.jobs[request['TrainingJobName']] = Job(a, request)
        if what == 'DescribeTrainingJob' and status == 200:
            told = json.loads(data)
            data = json.dumps(told | a.jobs[told['TrainingJobName']].state).encode()
        self.send(status, headers, data)

    def do_GET(self):
        self.send(*self.pass_on(None))

    do_PUT = do_DELETE = do_HEAD = do_POST

    def pass_on(self, body):
        c = http.client.HTTPConnection(self.amazon.moto_at, timeout=60)
        c.request(self.command, self.path, body, dict(self.headers))
        r = c.getresponse()
        return (
            r.status,
            [
                (k, v)
                for k, v in r.getheaders()
                if k.lower() not in ('content-length', 'transfer-encoding', 'connection', 'date', 'server')
            ],
            r.read(),
        )

    def answer(self, status, what):
        self.send(status, [('Content-Type', 'application/x-amz-json-1.1')], json.dumps(what).encode())

    def send(self, status, headers, data):
        self.send_response(status)
        for k, v in headers:
            self.send_header(k, v)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Job:
    "One training job: its hosts, as often as it takes."

    def __init__(self, amazon, request):
        self.amazon, self.request, self.name = amazon, request, request['TrainingJobName']
        self.s3, self.logs = amazon.client('s3'), amazon.client('logs')
        self.hosts = [f'algo-{i + 1}' for i in range(request['ResourceConfig']['InstanceCount'])]
        self.running, self.attempt, self.asked_to_stop, self.taken, self.begun = (
            [],
            0,
            False,
            False,
            time.time(),
        )
        self.moves, self.state = (
            [],
            dict(TrainingJobStatus='InProgress', SecondaryStatus='Starting', SecondaryStatusTransitions=[]),
        )
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def live(self):
        try:
            while self.state['TrainingJobStatus'] == 'InProgress':
                self.once()
        except Exception as e:
            self.end('Failed', FailureReason=f'InternalServerError: {type(e).__name__}: {e}')
            raise

    def once(self):  # one set of containers
        self.attempt += 1
        self.say('Downloading')
        roots = {h: self.furnish(h) for h in self.hosts}
        self.say('Training')
        self.taken = False
        self.running = [self.start(h, root) for h, root in roots.items()]
        done = threading.Event()
        sync = threading.Thread(target=self.keep_in_step, args=(roots, done))
        sync.start()
        while any(p.poll() is None for p in self.running):
            if self.asked_to_stop:
                self.kill()
            if self.attempt == 1 and not self.taken and self.amazon.interrupt(self):
                self.take_away(done, sync)
            time.sleep(0.05)
        done.set()
        sync.join()
        for p in self.running:
            p.printed.join()
        codes, failed = (
            [p.returncode for p in self.running],
            [f.read_text()[:1024] for f in (r / 'output/failure' for r in roots.values()) if f.exists()],
        )
        if self.taken:
            return self.say('Interrupted')
        if self.asked_to_stop:
            return self.end('Stopped')
        if any(codes):
            code = next(code for code in codes if code)
            reason = f'AlgorithmError: {(failed or ["no word"])[0]}, exit code: {code}'
            return self.end('Failed', FailureReason=reason)
        self.say('Uploading')
        self.collect(roots)
        self.end('Completed')

    def take_away(self, done, sync):  # one spot machine goes, and SageMaker ends the others
        self.taken = True
        done.set()
        sync.join()
        if self.amazon.tear:
            bucket, prefix = self.place(self.request['CheckpointConfig']['S3Uri'])
            newest = max(
                k for k in self.amazon.keys(bucket, prefix) if k.endswith('state.json') and '/.' not in k
            )
            self.torn = newest.split('/')[-2]
            self.s3.delete_object(Bucket=bucket, Key=newest.replace('state.json', 'optimizer.safetensors'))
        self.running[-1].kill()
        time.sleep(1)
        self.kill()

    def say(self, now):
        self.moves.append(dict(Status=now, StartTime=time.time()))
        self.state = dict(self.state, SecondaryStatus=now, SecondaryStatusTransitions=list(self.moves))
        time.sleep(0.3)

    def end(self, how, **more):
        took = int(time.time() - self.begun) + 1
        self.state = dict(
            self.state,
            TrainingJobStatus=how,
            SecondaryStatus=how,
            TrainingTimeInSeconds=took,
            BillableTimeInSeconds=took // 3 + 1,
            **more,
        )

    def stop(self):
        self.asked_to_stop = True
        self.say('Stopping')

    def kill(self):
        for p in self.running:
            p.kill()

    # ---- what the containers are given

    def place(self, uri):
        bucket, _, prefix = uri.removeprefix('s3://').partition('/')
        return bucket, prefix

    def furnish(self, host) -> Path:  # what will be /opt/ml
        root = self.amazon.folder / f'{self.name}-{self.attempt}-{host}'
        for p in ('input/config', 'model', 'output', 'checkpoints'):
            (root / p).mkdir(parents=True)
        for c in self.request['InputDataConfig']:
            self.bring(c['DataSource']['S3DataSource'], root / 'input/data' / c['ChannelName'])
        if checkpoints := self.request.get('CheckpointConfig'):
            self.bring(dict(S3DataType='S3Prefix', S3Uri=checkpoints['S3Uri'] + '/'), root / 'checkpoints')
        group = dict(
            instance_group_name='homogeneousCluster',
            instance_type=self.request['ResourceConfig']['InstanceType'],
            hosts=self.hosts,
        )
        for name, what in dict(
            resourceconfig=dict(
                current_host=host,
                hosts=self.hosts,
                network_interface_name='lo',
                current_instance_type=group['instance_type'],
                current_group_name=group['instance_group_name'],
                instance_groups=[group],
            ),
            hyperparameters=self.request.get('HyperParameters', {}),
            inputdataconfig={
                c['ChannelName']: dict(TrainingInputMode='File') for c in self.request['InputDataConfig']
            },
        ).items():
            (root / f'input/config/{name}.json').write_text(json.dumps(what))
        return root

    def bring(self, source, folder):
        bucket, at = self.place(source['S3Uri'])
        if source['S3DataType'] == 'ManifestFile':
            (first, *keys), base = json.loads(self.s3.get_object(Bucket=bucket, Key=at)['Body'].read()), None
            bucket, base = self.place(first['prefix'])
            found = [base + k for k in keys]
        else:
            base, found = at.rstrip('/') + '/', self.amazon.keys(bucket, at.rstrip('/') + '/')
        for key in found:
            to = folder / key.removeprefix(base)
            to.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(bucket, key, str(to))

    def start(self, host, root):
        hosts = self.amazon.folder / 'hosts'
        hosts.write_text('127.0.0.1 localhost\n' + ''.join(f'127.0.0.1 {h}\n' for h in self.hosts))
        a, ml = self.request['AlgorithmSpecification'], Path('/opt/ml')
        ml.mkdir(parents=True, exist_ok=True)
        command = (
            [*a['ContainerEntrypoint'], *a['ContainerArguments']]
            if not self.amazon.container
            else ['bash', '-c', self.amazon.container]
        )
        env = dict(
            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
            HOME=str(self.amazon.folder),
            LANG='C.UTF-8',
            TRAINING_JOB_NAME=self.name,
            GLOO_SOCKET_IFNAME='lo',
            DS_ACCELERATOR='cpu',
            OMP_NUM_THREADS='1',
            PIP_NO_INDEX='1',
            PIP_DISABLE_PIP_VERSION_CHECK='1',
            **self.request.get('Environment', {}),
        )
        p = subprocess.Popen(
            [
                'unshare',
                '-m',
                '-u',
                '-p',
                '-f',
                '--kill-child',
                '--mount-proc',
                'bash',
                '-c',
                'hostname "$1" && mount --bind "$2" /etc/hosts && mount --bind "$3" /opt/ml'
                ' && cd / && shift 3 && exec "$@"',
                'container',
                host,
                str(hosts),
                str(root),
                *command,
            ],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
        )
        p.printed = threading.Thread(
            target=self.log, args=(f'{self.name}/{host}-{int(time.time() * 1000)}', p.stdout)
        )
        p.printed.start()
        return p

    # ---- what leaves them

    def log(self, stream, out):
        with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
            self.logs.create_log_group(logGroupName=GROUP)
        self.logs.create_log_stream(logGroupName=GROUP, logStreamName=stream)
        for line in out:
            if line.strip():
                self.logs.put_log_events(
                    logGroupName=GROUP,
                    logStreamName=stream,
                    logEvents=[dict(timestamp=int(time.time() * 1000), message=line.rstrip('\n'))],
                )

    def keep_in_step(
        self, roots, done
    ):  # one file after the other, as they come: what is in S3 at a given moment may be half of a checkpoint
        if not (c := self.request.get('CheckpointConfig')):
            return done.wait()
        (bucket, prefix), sent = self.place(c['S3Uri']), {}
        for root in roots.values():
            sent |= {
                f: f.stat().st_mtime_ns for f in (root / 'checkpoints').rglob('*') if f.is_file()
            }  # what came from there
        while True:
            last = done.wait(0.3)
            for root in roots.values():
                for f in sorted(p for p in (root / 'checkpoints').rglob('*') if p.is_file()):
                    if self.taken:
                        return
                    try:
                        if sent.get(f) == (now := f.stat().st_mtime_ns):
                            continue
                        self.s3.upload_file(str(f), bucket, f'{prefix}/{f.relative_to(root / "checkpoints")}')
                        sent[f] = now
                    except OSError:
                        pass  # it was renamed meanwhile
                for f in [f for f in sent if f.is_relative_to(root) and not f.exists()]:
                    if not self.taken:
                        self.s3.delete_object(
                            Bucket=bucket, Key=f'{prefix}/{f.relative_to(root / "checkpoints")}'
                        )
                        del sent[f]
            if last:
                return

    def collect(self, roots):
        bucket, prefix = self.place(self.request['OutputDataConfig']['S3OutputPath'])
        with tempfile.TemporaryDirectory() as d:
            with tarfile.open(f'{d}/model.tar.gz', 'w:gz') as tar:
                for root in roots.values():
                    for p in sorted((root / 'model').iterdir()):
                        tar.add(p, p.name)
            self.s3.upload_file(f'{d}/model.tar.gz', bucket, f'{prefix}/{self.name}/output/model.tar.gz')
