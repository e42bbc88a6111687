# ruff: noqa: E501 (a table)
"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests with the real client.
It keeps in memory what it is sent.

What it speaks, and where huggingface_hub 2.4.0 asks for it:

| request | answers | asked by |
|---|---|---|
| GET  /api/whoami-v2                          | 200, 401                | HfApi.whoami |
| POST /api/repos/create                       | 200, 400, 401, 403, 409 | HfApi.create_repo; 409 with `url` where it exists, 403 sends the client to repo_info |
| POST /api/validate-yaml                      | 200, 400                | HfApi._validate_yaml, before a commit with README.md: `errors`, `warnings` |
| GET  /api/{models,spaces}/ID[/revision/REV]  | 200, 401, 404           | HfApi.model_info, space_info; `?blobs=true` adds sizes and hashes |
| GET  /api/{...}/ID/tree/REV[/PATH]           | 200, 404                | HfApi.list_repo_tree, for snapshot_download |
| POST /api/{...}/ID/paths-info/REV            | 200, 404                | HfApi.get_paths_info |
| POST /api/{...}/ID/preupload/REV             | 200, 403, 404           | _commit_api._fetch_upload_modes: `lfs` or `regular`, and the present hash |
| POST /[spaces/]ID.git/info/lfs/objects/batch | 200, 403, 413           | lfs.post_lfs_batch_info; an object that is here has no `actions` |
| PUT  /lfs/OID?part=N, POST /lfs/OID/complete | 200, 400, 403, 413      | lfs._upload_single_part, lfs._upload_multi_part, by signed address without a token |
| POST /lfs/OID/verify                         | 200, 404                | lfs.lfs_upload |
| POST /api/{...}/ID/commit/REV                | 200, 400, 403, 404, 412 | _commit_api._send_commit: ndjson of header, file, lfsFile, deletedFile, deletedFolder |
| HEAD, GET /[spaces/]ID/resolve/REV/PATH      | 200, 302, 404           | file_download.get_hf_file_metadata; X-Repo-Commit, ETag, X-Linked-Size, X-Linked-Etag |
| GET  /lfs/OID                                | 200, 206, 416           | file_download.http_get, where 302 leads; `Range` resumes |
| GET  /api/{...}/ID/xet-{write,read}-token/REV | 200, 403, 404          | _commit_api._upload_xet_files, file_download.xet_get: where hf_xet finds its storage |

Errors carry X-Error-Code (RepoNotFound, RevisionNotFound, EntryNotFound) and X-Error-Message, as
utils._http.hf_raise_for_status reads them. `Hub.fault` injects others: 429 with Retry-After, 413, 500, a
connection that breaks.

**Xet.** With hf_xet installed and HF_HUB_DISABLE_XET unset, the client sends large files by Xet whatever the Hub
offers: `_commit_api._upload_files` does not ask, and falls back to LFS for buffers only. Both ways work here.
`Hub(xet=FOLDER)` names `local://FOLDER` as the storage. hf_xet's own code for a local storage keeps chunks there and
assembles files from them. The stand-in reads from its shards which files it has (`xet_files`), and sends X-Xet-Hash
with them.

**Not covered**: what hf_xet sends to the real storage over HTTP (grants, xorbs, shards), and the real Hub's bridge
that serves such a file to a client without hf_xet. Not here at all: datasets, branches and pull requests, gated
repositories, the scan of pickles, the true sizes of quotas and rates.
"""

import base64
import hashlib
import json
import re
import secrets
import struct
import threading
from collections import defaultdict
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import yaml

ATTRIBUTES = ''.join(
    f'{p} filter=lfs diff=lfs merge=lfs -text\n'
    for p in [
        '*.bin',
        '*.ckpt',
        '*.gz',
        '*.h5',
        '*.npy',
        '*.npz',
        '*.onnx',
        '*.pickle',
        '*.pkl',
        '*.pt',
        '*.pth',
        '*.safetensors',
        '*.tar',
        '*.zip',
    ]
)  # as the Hub begins one
LICENSES = [
    'apache-2.0',
    'mit',
    'openrail',
    'creativeml-openrail-m',
    'openrail++',
    'cc0-1.0',
    'cc-by-4.0',
    'cc-by-nc-4.0',
    'cc-by-sa-4.0',
    'bsd-3-clause',
    'gpl-3.0',
    'unknown',
    'other',
]  # of those that the Hub knows
HUGE = 10_000_000  # a regular file is smaller


def git_sha(data):
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def words(data):  # a hash as Xet writes it: four numbers of 64 bits
    return ''.join(data[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def xet_files(folder):
    "sha256 -> Xet's hash and size, of the files in a local storage of hf_xet: the list at the beginning of each shard."
    found = {}
    for shard in Path(folder).rglob('shards/*.mdb'):
        data, at = shard.read_bytes(), 48
        while (name := data[at : at + 32]) != b'\xff' * 32:
            flags, n = struct.unpack('<II', data[at + 32 : at + 40])
            segments = at + 48
            at = segments + 48 * n * (2 if flags >> 31 else 1)
            size = sum(
                struct.unpack('<I', data[segments + 48 * i + 36 : segments + 48 * i + 40])[0]
                for i in range(n)
            )
            if flags >> 30 & 1:
                found[words(data[at : at + 32])] = words(name), size
                at += 48
    return found


class Wrong(Exception):
    "An answer that is no success."

    def __init__(self, status, message='', code='', **headers):
        self.status, self.message, self.headers = (
            status,
            message,
            headers
            | ({'X-Error-Code': code} if code else {})
            | ({'X-Error-Message': message} if message else {}),
        )


class Repo:
    def __init__(self, private, sdk=None):
        self.private, self.sdk, self.commits, self.blobs, self.lock = private, sdk, [], {}, threading.Lock()
        born = {'.gitattributes': ATTRIBUTES} | ({'README.md': f'---\nsdk: {sdk}\n---\n'} if sdk else {})
        self.commit('initial commit', {k: self.blob(v.encode()) for k, v in born.items()}, 'the Hub')

    def blob(self, data):
        self.blobs[git_sha(data)] = data
        return dict(oid=git_sha(data), size=len(data))

    def commit(self, title, files, author):
        oid = hashlib.sha1(
            json.dumps(
                [self.commits and self.commits[-1]['oid'], title, author, files], sort_keys=True
            ).encode()
        ).hexdigest()
        self.commits.append(dict(oid=oid, title=title, files=files, author=author))
        return oid

    @property
    def head(self):
        return self.commits[-1]['oid']

    @property
    def files(self):
        return self.commits[-1]['files']

    def at(self, revision):
        if found := [
            c
            for c in self.commits
            if revision in (c['oid'], 'main') and (revision != 'main' or c is self.commits[-1])
        ]:
            return found[0]
        raise Wrong(404, f'Invalid rev id: {revision}', 'RevisionNotFound')


class Hub:
    "`with Hub() as hub:` serves at `hub.url`; `tokens`: token -> dict(user, write), where write is True, or the repositories and namespaces that it may write."

    def __init__(self, tokens=None, part=0, xet=''):
        self.tokens, self.repos, self.lfs, self.parts, self.signed = (
            tokens or dict(hf_writer=dict(user='someone', write=True)),
            {},
            {},
            defaultdict(dict),
            secrets.token_hex(8),
        )
        self.part, self.xet, self.faults, self.log, self.lock = (
            part,
            xet,
            [],
            [],
            threading.Lock(),
        )  # part: bytes of a part of a multipart upload, 0: in one piece
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), dict(hub=self)))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        threading.Thread(
            target=self.server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, request, times=1, skip=0, **what):
        """Make requests that match a pattern of 'METHOD /path' fail.

        `what`: status, message, headers and body of the response; `cut`: close the connection after so many
        bytes of the body; `lost`: do what was asked, but do not respond; `first`: a function to call before.
        """
        self.faults.append(dict(request=request, times=times, skip=skip, **what))

    def asked(self, pattern=''):
        return [line for line in self.log if re.search(pattern, line)]  # 'METHOD /path STATUS'

    def clear(self):
        self.log.clear()
        self.faults.clear()

    def due(self, request):  # the fault that this request meets
        with self.lock:
            for f in self.faults:
                if f['times'] > 0 and re.search(f['request'], request):
                    if f['skip']:
                        f['skip'] -= 1
                        continue
                    f['times'] -= 1
                    return f

    # who may do what
    def who(self, headers):
        token = (headers.get('Authorization') or '').removeprefix('Bearer ')
        if token and token not in self.tokens:
            raise Wrong(401, 'Invalid credentials in Authorization header')
        return self.tokens.get(token)

    def may_write(self, who, id):
        return (who['write'] is True and id.split('/')[0] == who['user']) or (
            who['write'] is not True and bool({id, id.split('/')[0]} & set(who['write']))
        )

    def repo(self, kind, id, who, write=False):
        repo = self.repos.get((kind, id))
        sees = repo and (
            not repo.private or (who and (who['user'] == id.split('/')[0] or self.may_write(who, id)))
        )
        if not sees:
            raise Wrong(404 if who else 401, 'Repository not found', 'RepoNotFound')
        if write and not who:
            raise Wrong(401, 'Invalid username or password.')
        if write and not self.may_write(who, id):
            raise Wrong(403, 'Forbidden: you must use a write token to upload to a repository.')
        return repo

    # the API
    def create(self, who, name, organization=None, type='model', visibility='public', sdk=None, **_):
        if not who:
            raise Wrong(401, 'Invalid username or password.')
        id = f'{organization or who["user"]}/{name}'
        if (
            not re.fullmatch(r'[\w-][\w.-]{0,95}', name, re.A)
            or '--' in name
            or '..' in name
            or name.endswith(('.', '-', '.git'))
        ):
            raise Wrong(400, f'Invalid repository name: {name}')
        url = f'{self.url}/{"spaces/" if type == "space" else ""}{id}'
        namespace = id.split('/')[0]
        owner = who['write'] is True and namespace == who['user']
        allowed = who['write'] if who['write'] is not True else ()  # a token of one repository creates none
        if not owner and namespace not in allowed:
            message = f'You don\'t have the rights to create a {type} under the namespace "{namespace}"'
            raise Wrong(403, message)
        with self.lock:
            if (type, id) in self.repos:
                raise Exists(url)
            self.repos[type, id] = Repo(visibility == 'private', sdk)
        return dict(url=url, name=id, id=secrets.token_hex(12))

    def info(self, kind, id, repo, revision='main', blobs=False):
        commit = repo.at(revision)

        def sibling(path, f):
            lfs = (
                dict(lfs=dict(sha256=f['sha256'], size=f['size'], pointerSize=f['pointer']))
                if 'sha256' in f
                else {}
            )
            return dict(rfilename=path) | (dict(blobId=f['oid'], size=f['size']) | lfs if blobs else {})

        return dict(
            id=id,
            modelId=id,
            author=id.split('/')[0],
            sha=commit['oid'],
            private=repo.private,
            gated=False,
            disabled=False,
            tags=[],
            siblings=[sibling(*i) for i in sorted(commit['files'].items())],
        ) | (dict(sdk=repo.sdk) if kind == 'space' else {})

    def entry(self, path, f):
        return (
            dict(type='file', path=path, oid=f['oid'], size=f['size'])
            | (
                dict(lfs=dict(oid=f['sha256'], size=f['size'], pointerSize=f['pointer']))
                if 'sha256' in f
                else {}
            )
            | (dict(xetHash=f['xet']) if 'xet' in f else {})
        )

    def tree(self, repo, revision, under='', recursive=False):
        files = {
            p: f for p, f in repo.at(revision)['files'].items() if not under or p.startswith(under + '/')
        }
        folders = {'/'.join(p.split('/')[:i]) for p in files for i in range(1, p.count('/') + 1)}
        rows = [self.entry(*i) for i in files.items()] + [
            dict(type='directory', path=p, oid=git_sha(p.encode()), size=0)
            for p in folders
            if p.startswith(under) and p != under
        ]
        return sorted(
            (r for r in rows if recursive or '/' not in r['path'].removeprefix(under + '/' if under else '')),
            key=lambda r: r['path'],
        )

    def mode(
        self, repo, file
    ):  # by name, by size, and by what the sample shows: the client sends it for that
        attributes = (
            repo.blobs[repo.files['.gitattributes']['oid']].decode() if '.gitattributes' in repo.files else ''
        )
        named = any(
            fnmatch(file['path'].rpartition('/')[2], line.split()[0])
            for line in attributes.splitlines()
            if 'filter=lfs' in line
        )
        return (
            'lfs' if named or file['size'] > HUGE or b'\0' in base64.b64decode(file['sample']) else 'regular'
        )

    def preupload(self, repo, files):
        def present(path):
            return repo.files.get(path, {}).get('sha256') or repo.files.get(path, {}).get('oid')

        return dict(
            files=[
                dict(
                    path=f['path'], uploadMode=self.mode(repo, f), shouldIgnore=False, oid=present(f['path'])
                )
                for f in files
            ]
        )

    def batch(self, objects):
        def actions(o):
            if o['oid'] in self.lfs:
                return {}
            n = -(-o['size'] // self.part) if self.part and o['size'] > self.part else 0
            href, verify = f'{self.url}/lfs/{o["oid"]}', dict(href=f'{self.url}/lfs/{o["oid"]}/verify')
            upload = (
                dict(href=f'{href}?sign={self.signed}&size={o["size"]}')
                if not n
                else dict(
                    href=f'{href}/complete?sign={self.signed}&size={o["size"]}',
                    header={'chunk_size': str(self.part)}
                    | {
                        str(i): f'{href}?sign={self.signed}&part={i}&size={o["size"]}'
                        for i in range(1, n + 1)
                    },
                )
            )
            return dict(actions=dict(upload=upload, verify=verify))

        return dict(
            transfer='multipart' if self.part else 'basic',
            objects=[dict(oid=o['oid'], size=o['size'], **actions(o)) for o in objects],
        )

    def store(self, oid, data, size):
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise Wrong(400, 'BadDigest: size or sha256 is another')
        self.lfs[oid] = data

    def complete(self, oid, size, parts):
        mine = self.parts.pop(oid, {})
        if [p['partNumber'] for p in parts] != sorted(mine) or any(
            p['etag'].strip('"') != hashlib.md5(mine[p['partNumber']]).hexdigest() for p in parts
        ):
            raise Wrong(400, 'InvalidPart')
        self.store(oid, b''.join(mine[k] for k in sorted(mine)), size)

    def commit(self, kind, id, repo, who, lines, revision):
        if revision != 'main':
            raise Wrong(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        header, *operations = lines
        with repo.lock:  # all of it, or nothing
            if header['value'].get('parentCommit', repo.head) != repo.head:
                raise Wrong(412, 'A commit has happened since. Please refresh and try again.')
            files = dict(repo.files)
            for o in operations:
                self.apply(repo, files, o['key'], o['value'])
            oid = repo.commit(header['value']['summary'], files, who['user'])
        return dict(
            success=True,
            commitOid=oid,
            commitUrl=f'{self.url}/{"spaces/" if kind == "space" else ""}{id}/commit/{oid}',
            hookOutput='',
        )

    def apply(self, repo, files, key, v):
        path = v['path']
        if path.startswith('/') or '..' in path.split('/'):
            raise Wrong(400, f'Invalid path: {path}')
        if key == 'file':
            files[path] = repo.blob(base64.b64decode(v['content']))
        elif key == 'lfsFile':
            xet, size = xet_files(self.xet).get(v['oid'], ('', 0)) if self.xet else ('', 0)
            size = len(self.lfs[v['oid']]) if v['oid'] in self.lfs else size
            if not size or v.get('size', size) != size:
                raise Wrong(400, f'LFS pointer pointed to a file that does not exist, for {path}')
            pointer = (
                f'version https://git-lfs.github.com/spec/v1\noid sha256:{v["oid"]}\nsize {size}\n'.encode()
            )
            files[path] = dict(repo.blob(pointer), sha256=v['oid'], size=size, pointer=len(pointer)) | (
                dict(xet=xet) if xet else {}
            )
        elif key == 'deletedFile':
            if path not in files:
                raise Wrong(404, "A file with this name doesn't exist", 'EntryNotFound')
            del files[path]
        elif key == 'deletedFolder':
            for p in [p for p in files if p.startswith(path.rstrip('/') + '/')]:
                del files[p]
        else:
            raise Wrong(400, f'unknown operation {key}')

    def validate(self, content, **_):
        "What the Hub's documentation says of the header; the real check knows more."
        head = re.match(r'---\s*\n(.*?)\n---\s*\n', content, re.S)
        try:
            card = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as e:
            return [f'Invalid YAML: {e}'], []
        if not isinstance(card, dict):
            return [], ['empty or missing yaml metadata in repo card']
        errors = []
        if card.get('license') not in (None, *LICENSES):
            errors.append(f'"license" must be one of {LICENSES}')
        if card.get('license_name') and not re.fullmatch(r'[a-z0-9-.]+', card['license_name']):
            errors.append('"license_name" must match /^[a-z0-9-.]+$/')
        if not isinstance(card.get('tags', []), list):
            errors.append('"tags" must be an array')
        if card.get('base_model_relation') not in (None, 'adapter', 'finetune', 'merge', 'quantized'):
            errors.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
        bases = card.get('base_model') or []
        errors += [
            f'"base_model" with value "{b}" is not valid'
            for b in (bases if isinstance(bases, list) else [bases])
            if not re.fullmatch(r'[\w.-]+/[\w.-]+', str(b))
        ]
        for i, m in enumerate(card.get('model-index') or []):
            if not m.get('name'):
                errors.append(f'"model-index[{i}].name" is required')
            for r in m.get('results', []):
                if (
                    not (r.get('task') or {}).get('type')
                    or not {'name', 'type'} <= set(r.get('dataset') or {})
                    or not r.get('metrics')
                ):
                    errors.append(f'"model-index[{i}].results" is not valid')
                errors += [
                    f'"model-index[{i}].results.metrics" needs type and value'
                    for x in r.get('metrics') or []
                    if not x.get('type') or x.get('value') is None
                ]
        link = card.get('license_link')
        if link and link not in ('LICENSE', 'LICENSE.md') and not link.startswith(('http://', 'https://')):
            errors.append('"license_link" must be LICENSE, LICENSE.md or an address')
        return errors, [
            '"license_name" and "license_link" should be given where license is other'
        ] if card.get('license') == 'other' and not (
            card.get('license_name') and card.get('license_link')
        ) else []


class Exists(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = 'HTTP/1.1', True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self):
        self.path, _, query = self.path.partition('?')
        self.query = {k: v[0] for k, v in parse_qs(query).items()}
        self.asked = f'{self.command} {unquote(self.path)}'
        fault = self.hub.due(self.asked)
        length = int(self.headers.get('Content-Length') or 0)
        if fault and 'first' in fault:
            fault['first']()
        if fault and 'cut' in fault:
            self.rfile.read(min(length, fault['cut']))
            self.note('cut')
            self.close_connection = True
            self.connection.close()
            return
        self.body = (
            self.chunks() if self.headers.get('Transfer-Encoding') == 'chunked' else self.rfile.read(length)
        )
        if fault and 'status' in fault:
            return self.answer(
                fault['status'],
                fault['body'].encode() if 'body' in fault else dict(error=fault.get('message', '')),
                fault.get('headers', {}),
            )
        try:
            status, what, headers = self.route()
        except Exists as e:
            status, what, headers = 409, dict(error='You already created this repo', url=e.args[0]), {}
        except Wrong as e:
            status, what, headers = e.status, dict(error=e.message), e.headers
        if fault and 'lost' in fault:
            self.note('lost')
            self.close_connection = True
            self.connection.close()
            return
        self.answer(status, what, headers)

    def chunks(self):
        body = b''
        while n := int(self.rfile.readline().split(b';')[0], 16):
            body += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def note(self, status):
        self.hub.log.append(f'{self.asked} {status}')

    def answer(self, status, what, headers):
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.note(status)
        self.send_response(status)
        for k, v in (
            {
                'Content-Type': 'application/json',
                'Content-Length': str(len(data)),
                'X-Request-Id': secrets.token_hex(4),
            }
            | headers
        ).items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def route(self):  # -> status, what, headers
        hub, path, load = self.hub, unquote(self.path), lambda: json.loads(self.body)
        if m := re.fullmatch(r'/lfs/(\w{64})(/\w+)?', path):
            return self.large(m[1], m[2])
        who = hub.who(self.headers)
        if path == '/api/whoami-v2':
            if not who:
                raise Wrong(401, 'Invalid username or password.')
            return (
                200,
                dict(
                    type='user',
                    name=who['user'],
                    orgs=[],
                    auth=dict(accessToken=dict(displayName='test', role='write')),
                ),
                {},
            )
        if path == '/api/repos/create':
            return 200, hub.create(who, **load()), {}
        if path == '/api/validate-yaml':
            errors, warnings = hub.validate(**load())
            return (
                400 if errors else 200,
                dict(errors=[dict(message=e) for e in errors], warnings=[dict(message=w) for w in warnings]),
                {},
            )
        if m := re.fullmatch(r'/(spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            hub.repo('space' if m[1] else 'model', m[2], who, write=True)
            return 200, hub.batch(load()['objects']), {}
        if m := re.fullmatch(r'/api/(model|space)s/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?', path):
            return self.api(hub, who, *m.groups(), load)
        if m := re.fullmatch(r'/(spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            return self.resolve(hub, who, *m.groups())
        raise Wrong(404, f'the stand-in does not know {self.asked}')

    def api(self, hub, who, kind, id, verb, revision, rest, load):
        repo = hub.repo(kind, id, who, write=verb in ('preupload', 'commit', 'xet-write-token'))
        if verb in (None, 'revision'):
            return (
                200,
                hub.info(kind, id, repo, revision or 'main', self.query.get('blobs', '').lower() == 'true'),
                {},
            )
        if verb == 'tree':
            return (
                200,
                hub.tree(repo, revision, rest or '', self.query.get('recursive', '').lower() == 'true'),
                {},
            )
        if verb == 'paths-info':
            wanted, files = parse_qs(self.body.decode()).get('paths', []), repo.at(revision)['files']
            return 200, [hub.entry(p, files[p]) for p in wanted if p in files], {}
        if verb == 'preupload':
            repo.at(revision)
            return 200, hub.preupload(repo, load()['files']), {}
        if verb == 'commit':
            return (
                200,
                hub.commit(
                    kind, id, repo, who, [json.loads(line) for line in self.body.splitlines()], revision
                ),
                {},
            )
        if verb in ('xet-write-token', 'xet-read-token') and hub.xet:
            cas = dict(casUrl=f'local://{hub.xet}', exp=2_000_000_000, accessToken='xet')
            return (
                200,
                cas,
                {
                    'X-Xet-Cas-Url': cas['casUrl'],
                    'X-Xet-Access-Token': 'xet',
                    'X-Xet-Token-Expiration': str(cas['exp']),
                },
            )
        raise Wrong(404, f'the stand-in does not know {self.asked}')

    def large(self, oid, verb):  # by a signed address: no token
        hub, size = self.hub, int(self.query.get('size', 0))
        if verb == '/verify':
            if oid not in hub.lfs:
                raise Wrong(404, 'no such object')
            return 200, {}, {}
        if self.command in ('PUT', 'POST') and self.query.get('sign') != hub.signed:
            raise Wrong(403, 'SignatureDoesNotMatch')
        if verb == '/complete':
            hub.complete(oid, size, json.loads(self.body)['parts'])
            return 200, {}, {}
        if self.command == 'PUT' and 'part' in self.query:
            hub.parts[oid][int(self.query['part'])] = self.body
            return 200, b'', {'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'}
        if self.command == 'PUT':
            hub.store(oid, self.body, size)
            return 200, b'', {'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'}
        if oid not in hub.lfs:
            raise Wrong(404, 'no such object')
        return self.ranged(hub.lfs[oid], {'ETag': f'"{oid}"', 'Content-Type': 'application/octet-stream'})

    def ranged(self, data, headers):
        if not (m := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')):
            return 200, data, headers | {'Accept-Ranges': 'bytes'}
        first, last = int(m[1]), min(int(m[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            raise Wrong(416, **{'Content-Range': f'bytes */{len(data)}'})
        return 206, data[first : last + 1], headers | {'Content-Range': f'bytes {first}-{last}/{len(data)}'}

    def resolve(self, hub, who, space, id, revision, path):
        repo = hub.repo('space' if space else 'model', id, who)
        commit = repo.at(revision)
        says = {'X-Repo-Commit': commit['oid']}
        if path not in commit['files']:
            raise Wrong(404, 'Entry not found', 'EntryNotFound', **says)
        f = commit['files'][path]
        if 'xet' in f:
            says |= {
                'X-Xet-Hash': f['xet'],
                'X-Xet-Refresh-Route': f'{hub.url}/api/{"space" if space else "model"}s/{id}/xet-read-token/{commit["oid"]}',
            }
        if 'sha256' in f:
            return (
                302,
                b'',
                says
                | {
                    'Location': f'{hub.url.replace("127.0.0.1", "localhost")}/lfs/{f["sha256"]}',
                    'X-Linked-Size': str(f['size']),
                    'X-Linked-Etag': f'"{f["sha256"]}"',
                },
            )  # another host, as the Hub's: the token stays behind
        return self.ranged(
            repo.blobs[f['oid']], says | {'ETag': f'"{f["oid"]}"', 'Content-Type': 'text/plain'}
        )
