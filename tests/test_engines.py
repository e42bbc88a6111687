"""TensorRT engines.

If tensorrt_rtx is installed, they are really built, ahead of time. A stand-in for the package
opens, refits and runs engines with ONNX Runtime.
"""

import ctypes
import json
import math
import shutil
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_generate import same
from tiny import tiny_model

from flowerdiff.core.checksums import write_checksums
from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.workspace import open_workspace
from flowerdiff.drawing.multistep import SAMPLERS
from flowerdiff.inference import backends
from flowerdiff.inference import benchmark as bench
from flowerdiff.inference import tensorrt as engines
from flowerdiff.inference import tensorrt_build as builder
from flowerdiff.inference.backends import load_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.inference.sampling_loop import generators, load_scheduler, sample
from flowerdiff.inference.tensorrt_build import (
    build_engine,
    half_file,
    profile_shapes,
    read_network,
    shape_profile,
)
from flowerdiff.stages import onnx as export
from flowerdiff.stages import tensorrt

PARTS = ['text_encoder', 'unet', 'vae_decoder', 'vae_encoder']


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    ws = open_workspace(tmp_path_factory.mktemp('engines') / 'ws', 'garden', {'evaluate.steps': 3})
    tiny_model(ws.model)
    for path in ws.model.glob(
        '*/*.safetensors'
    ):  # no two weights are equal, as in a trained model: equal ones are one in ONNX
        from safetensors.torch import load_file, save_file

        g = torch.Generator().manual_seed(1)
        save_file(
            {
                k: v + 0.02 * torch.randn(v.shape, generator=g) if v.is_floating_point() else v
                for k, v in load_file(path).items()
            },
            path,
            metadata=dict(format='pt'),
        )
    export.run(str(ws.root))
    return ws


@pytest.fixture
def ws(exported, tmp_path):
    return open_workspace(shutil.copytree(exported.root, tmp_path / 'ws'))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def how(result, key=None):
    return {
        k: m['how']
        for k, m in (result.status['sets'][key] if key else list(result.status['sets'].values())[-1])[
            'parts'
        ].items()
    }


def change(ws, part, what='weights'):
    "Other weights, or another graph, in all files of a part; and another model in the export's report."
    for path in (ws.onnx / part).glob('model*.onnx'):
        m = onnx.load(path)
        ts = [t for t in m.graph.initializer if t.data_type in (1, 10) and len(t.dims) == 4]
        if what == 'weights':
            ts[0].CopyFrom(
                numpy_helper.from_array(
                    numpy_helper.to_array(ts[0]) * np.array(1.5, numpy_helper.to_array(ts[0]).dtype),
                    ts[0].name,
                )
            )
        else:  # the output passes through one node more
            out, inner = m.graph.output[0].name, f'inner{len(m.graph.node)}'
            for n in m.graph.node:
                n.output[:] = [inner if o == out else o for o in n.output]
            m.graph.node.append(onnx.helper.make_node('Identity', [inner], [out]))
        onnx.save(m, path)
    parity = read_json(ws.onnx / 'parity.json')
    write_json(ws.onnx / 'parity.json', parity | dict(model=parity['model'] + part))
    write_checksums(ws.onnx)


# ---- built ahead of time with tensorrt_rtx

AHEAD = {'tensorrt.flavour': 'rtx', 'tensorrt.targets': ['SM86'], 'tensorrt.max_batch': 2}


@pytest.fixture
def rtx():
    return pytest.importorskip('tensorrt_rtx', reason='tensorrt_rtx builds engines without a GPU')


def test_rtx_builds_once_and_again_what_changed(ws, rtx, monkeypatch):
    first = tensorrt.run(str(ws.root), overrides=AHEAD)
    assert not first.skipped and how(first) == dict.fromkeys(PARTS, 'built')
    key = f'SM86-tensorrt_rtx-{rtx.__version__}'
    before = files(ws.tensorrt / key)
    assert set(before) == {f'{p}.engine' for p in PARTS} and min(map(len, before.values())) > 10_000
    with monkeypatch.context() as m:
        m.setattr(builder, 'build_engine', lambda *a, **k: pytest.fail('built again'))
        assert (
            how(tensorrt.run(str(ws.root))) == dict.fromkeys(PARTS, 'kept')
            and files(ws.tensorrt / key) == before
        )
    change(ws, 'vae_decoder', 'graph')
    change(ws, 'vae_encoder', 'weights')
    third = tensorrt.run(str(ws.root))
    assert how(third) == dict(text_encoder='kept', unet='kept', vae_decoder='built', vae_encoder='built')
    after = files(ws.tensorrt / key)
    assert {k for k in before if after[k] != before[k]} == {'vae_decoder.engine', 'vae_encoder.engine'}
    assert (
        '2 built' in third.summary
        and read_json(ws.tensorrt / 'status.json')['sets'][key]['model']
        == read_json(ws.onnx / 'parity.json')['model']
    )


def test_the_networks_match_the_profiles(exported, rtx):
    kinds = rtx.DataType
    profiles = profile_shapes(exported.onnx, 3)
    want = dict(
        text_encoder=[('input_ids', kinds.INT64)],
        unet=[('sample', kinds.FLOAT), ('timestep', kinds.INT64), ('encoder_hidden_states', kinds.FLOAT)],
        vae_decoder=[('latent_sample', kinds.FLOAT)],
        vae_encoder=[('sample', kinds.FLOAT)],
    )
    for part in PARTS:
        b, network, _parser = read_network(rtx, half_file(exported.onnx / part, 'fp16', None))
        assert [(x.name, x.dtype) for x in map(network.get_input, range(network.num_inputs))] == want[part]
        assert {network.get_output(i).dtype for i in range(network.num_outputs)} == {kinds.FLOAT}
        assert {network.get_layer(i).get_output(0).dtype for i in range(network.num_layers)} >= {kinds.HALF}
        profile = shape_profile(b, network, profiles[part])
        for name, shapes in profiles[part].items():
            assert [tuple(s) for s in profile.get_shape(name)] == list(shapes)
    assert [s[0] for s in profiles['unet']['sample']] == [1, 2, 6] and [
        s[0] for s in profiles['vae_decoder']['latent_sample']
    ] == [1, 1, 3]


def test_bf16_is_built_or_the_reason_is_one_line(exported, rtx, tmp_path):
    brain, shapes = (
        half_file(exported.onnx / 'vae_decoder', 'bf16', tmp_path),
        profile_shapes(exported.onnx)['vae_decoder'],
    )
    _, network, _parser = read_network(rtx, brain)
    inside = {network.get_layer(i).get_output(0).dtype for i in range(network.num_layers)}
    assert rtx.DataType.BF16 in inside and rtx.DataType.HALF not in inside
    assert len(build_engine(rtx, brain, shapes, targets=['SM86'])) > 10_000
    with pytest.raises(UserError, match=r'SM75.*b16') as e:
        build_engine(rtx, brain, shapes, targets=['SM75'])
    assert '\n' not in str(e.value)


def test_wrong_targets_get_one_line(ws, rtx):
    with pytest.raises(UserError, match=r"tensorrt.targets: 'SM1' is not one of SM75, SM80, SM86"):
        tensorrt.run(str(ws.root), overrides=AHEAD | {'tensorrt.targets': ['SM1']})
    assert not ws.tensorrt.exists()


@pytest.mark.parametrize('what', ['a broken file', 'a shape that cannot be'])
def test_a_failed_build_keeps_the_old_folder(ws, rtx, what, monkeypatch):
    tensorrt.run(str(ws.root), overrides=AHEAD)
    before = files(ws.tensorrt)
    if what == 'a broken file':
        (ws.onnx / 'vae_encoder' / 'model_fp16.onnx').write_bytes(b'no ONNX')
        write_checksums(ws.onnx)
    else:
        change(ws, 'vae_encoder', 'graph')
        monkeypatch.setattr(
            builder,
            'profile_shapes',
            lambda *a: {
                k: {n: ((3, *s[0][1:]), *s[1:]) if k == 'vae_encoder' else s for n, s in v.items()}
                for k, v in profile_shapes(*a).items()
            },
        )
    with pytest.raises(UserError, match='vae_encoder') as e:
        tensorrt.run(str(ws.root))
    assert (
        '\n' not in str(e.value)
        and files(ws.tensorrt) == before
        and not [p for p in ws.root.iterdir() if p.name.startswith('.tensorrt')]
    )


# ---- a stand-in


def stand_in(name='tensorrt', version='11.4'):
    """Return a package that builds, opens, refits and runs engines.

    Its engines are ONNX files after a line with their settings. ONNX Runtime runs them on the given memory.
    """

    class ILogger:
        Severity = IntEnum('Severity', 'INTERNAL_ERROR ERROR WARNING', start=0)

    class Builder:
        def __init__(self, log):
            assert isinstance(log, ILogger)

        def create_network(self, flags):
            assert flags == 1
            return SimpleNamespace(inputs=[], get_input=lambda i: None)

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            refit = 'REFIT' in config.flags
            trt.built.append((network.part, refit, config.timings.data if config.timings else None))
            if config.timings:
                config.timings.data += b'+'
            off = math.nan if trt.wrong == 'all' else 2.0 if trt.wrong == 'refit' and refit else 1.0
            return (
                json.dumps(
                    dict(refit=refit, off=off, profile=config.profile, capabilities=config.capabilities)
                ).encode()
                + b'\n'
                + network.model.SerializeToString()
            )

    class Profile(dict):
        def set_shape(self, name, low, best, high):
            self[name] = [list(low), list(best), list(high)]

    class Config:
        def __init__(self):
            self.flags, self.timings, self.capabilities = set(), None, []

        def add_optimization_profile(self, p):
            self.profile = dict(p)

        def set_flag(self, f):
            self.flags.add(f)

        def clear_flag(self, f):
            self.flags.discard(f)

        def create_timing_cache(self, data):
            return SimpleNamespace(data=data, serialize=lambda: self.timings.data)

        def set_timing_cache(self, t, ignore):
            self.timings = t
            return t.data != b'of another driver'

        def set_compute_capability(self, c, i):
            self.capabilities.append(c)

    class OnnxParser:
        def __init__(self, network, log):
            self.network = network

        def parse_from_file(self, path):
            n, m = self.network, onnx.load(path)
            n.model, n.part, n.num_inputs = m, path.split('/')[-2], len(m.graph.input)
            n.get_input = lambda i: m.graph.input[i]
            return True

    class Runtime:
        def __init__(self, log):
            assert isinstance(log, ILogger)

        def deserialize_cuda_engine(self, data):
            return CudaEngine(data) if data.startswith(b'{') else None

    class CudaEngine:
        def __init__(self, data):
            head, _, self.onnx = data.partition(b'\n')
            self.head = json.loads(head)
            self.refittable, self.off = self.head['refit'], self.head['off']
            self.open()

        def open(self):
            import onnxruntime as ort

            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = ort.InferenceSession(self.onnx, options)
            self.io = {x.name: x for x in (*self.session.get_inputs(), *self.session.get_outputs())}
            self.num_io_tensors = len(self.io)

        def get_tensor_name(self, i):
            return list(self.io)[::-1][i]  # outputs first: the order of names means nothing

        def get_tensor_mode(self, n):
            return (
                trt.TensorIOMode.INPUT
                if n in {x.name for x in self.session.get_inputs()}
                else trt.TensorIOMode.OUTPUT
            )

        def get_tensor_dtype(self, n):
            return SimpleNamespace(
                name={'tensor(float)': 'FLOAT', 'tensor(int64)': 'INT32' if n == 'input_ids' else 'INT64'}[
                    self.io[n].type
                ]
            )

        def get_tensor_shape(self, n):
            return [s if isinstance(s, int) else -1 for s in self.io[n].shape]

        def get_tensor_profile_shape(self, n, i):
            assert i == 0
            return self.head['profile'][n]

        def create_execution_context(self, runtime_config=None):
            return Context(self, runtime_config)

        def create_runtime_config(self):
            return RuntimeConfig()

        def create_serialization_config(self):
            return Config()

        def serialize_with_config(self, config):
            return (
                json.dumps(self.head | dict(refit='INCLUDE_REFIT' in config.flags)).encode()
                + b'\n'
                + self.onnx
            )

    class Context:
        def __init__(self, engine, config):
            self.engine, self.config, self.shapes, self.at = engine, config, {}, {}

        def set_input_shape(self, n, shape):
            low, _, high = self.engine.head['profile'][n]
            assert all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)), (n, shape)
            self.shapes[n] = shape

        def _run(self, feed):
            return dict(
                zip(
                    [o.name for o in self.engine.session.get_outputs()],
                    self.engine.session.run(
                        None, {n: x.astype(np.int64) if x.dtype == np.int32 else x for n, x in feed.items()}
                    ),
                )
            )

        def get_tensor_shape(self, n):
            if n in self.shapes:
                return self.shapes[n]
            kinds = {'tensor(float)': np.float32, 'tensor(int64)': np.int64}
            return self._run(
                {
                    x.name: np.zeros(self.shapes.get(x.name, ()), kinds[x.type])
                    for x in self.engine.session.get_inputs()
                }
            )[n].shape

        def set_tensor_address(self, n, a):
            assert a and a % 64 == 0
            self.at[n] = a  # TensorRT wants 256; 64 is what PyTorch gives on a CPU

        def execute_async_v3(self, stream):
            size = dict(FLOAT=4, INT32=4, INT64=8)
            trt.ran.append(dict(self.shapes))

            def read(n):
                kind, shape = self.engine.get_tensor_dtype(n).name, self.shapes.get(n, ())
                return np.frombuffer(
                    ctypes.string_at(self.at[n], size[kind] * math.prod(shape)),
                    dict(FLOAT=np.float32, INT32=np.int32, INT64=np.int64)[kind],
                ).reshape(shape)

            for n, x in self._run({x.name: read(x.name) for x in self.engine.session.get_inputs()}).items():
                ctypes.memmove(self.at[n], (x * np.float32(self.engine.off)).tobytes(), x.nbytes)
            if self.config:
                self.config.cache.data = b'kernels'
            return True

    class Refitter:
        def __init__(self, engine, log):
            assert engine.refittable
            self.engine = engine

        def refit_cuda_engine(self):
            self.engine.onnx = self.new
            self.engine.open()
            trt.refitted += 1
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter, log):
            self.refitter = refitter

        def refit_from_file(self, path):
            self.refitter.new = onnx.load(path).SerializeToString()
            return trt.wrong != 'weights'

    class RuntimeCache:
        data = b''

        def serialize(self):
            return self.data

        def deserialize(self, data):
            self.data = data
            return data == b'kernels'

    class RuntimeConfig:
        def create_runtime_cache(self):
            return RuntimeCache()

        def set_runtime_cache(self, c):
            self.cache = c

    def flags(*names):
        return type('Flags', (), {n: n for n in names})

    known = dict(
        ILogger=ILogger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
        TensorIOMode=flags('INPUT', 'OUTPUT'),
        BuilderFlag=flags('REFIT'),
        SerializationFlag=flags('INCLUDE_REFIT', 'EXCLUDE_WEIGHTS'),
        NetworkDefinitionCreationFlag=type('N', (), dict(STRONGLY_TYPED=0)),
        __version__=version,
        built=[],
        ran=[],
        refitted=0,
        wrong='',
    )
    if name == 'tensorrt_rtx':
        known |= dict(
            IRuntimeCache=RuntimeCache,
            ComputeCapability=type(
                'C', (), dict(__members__=['CURRENT', 'SM86'], CURRENT='CURRENT', SM86='SM86')
            ),
        )
    trt = type(name, (), known)
    return trt


@pytest.fixture
def machine(monkeypatch):
    "`machine(package, name, architecture)`: pretend there is such a GPU and package; memory is on the CPU."

    def there(trt, name='Fake GPU', architecture='SM90'):
        monkeypatch.setattr(engines, 'load_package', lambda n: trt if trt and n == trt.__name__ else None)
        for m in (engines, tensorrt):
            monkeypatch.setattr(m, 'find_gpu', lambda: engines.GPU(name, architecture))
        for m in (engines, tensorrt, backends):
            monkeypatch.setattr(m, 'cuda_device', lambda: 'cpu' if name else '')
        monkeypatch.setattr(backends, 'milliseconds_per_step', lambda b: dict(tensorrt=1).get(b.name, 2))
        return trt

    return there


def build(ws, **settings):
    return tensorrt.run(str(ws.root), overrides={f'tensorrt.{k}': v for k, v in settings.items()})


@pytest.mark.parametrize('name', ['tensorrt', 'tensorrt_rtx'])
def test_images_are_those_of_the_onnx_files(ws, machine, name):
    "Names, addresses, shapes, types, scaling: images of any batch are those of the half-precision files."
    trt = machine(stand_in(name))
    result = build(ws, max_batch=2)
    assert (
        how(result, f'Fake_GPU-{name}-11.4') == dict.fromkeys(PARTS, 'built')
        and max(m['difference'] for m in result.status['sets'][f'Fake_GPU-{name}-11.4']['parts'].values())
        < 0.01
    )
    request = dict(
        prompt=['a red rose', 'the sky', 'a blue iris in the meadow'],
        num_images_per_prompt=2,
        num_inference_steps=4,
        negative_prompt='blue',
    )
    ours = Generator.from_pretrained(ws.root, 'tensorrt', batch=5)
    trt.ran.clear()
    mine = ours(**request)
    half, full = (Generator.from_pretrained(ws.root, b)(**request) for b in ('onnx-fp16', 'onnx'))
    assert (
        same(mine, half)
        and export.picture_difference(mine, full)['psnr'] > 45
        and not same(mine[:1], mine[1:2])
    )
    assert {r['sample'][0] for r in trt.ran if 'sample' in r} == {4, 2} and [
        r['input_ids'] for r in trt.ran if 'input_ids' in r
    ] == [(4, 16)]  # 10 = 4 + 4 + 2
    with pytest.raises(
        UserError,
        match=r'takes sample of \[4, 16, 16\] to \[4, 16, 16\], not \[4, 24, 24\]; use the size of the model',
    ):
        ours('a red rose', size=48)
    steps = []
    ours('a red rose', num_inference_steps=2, callback=lambda s: steps.append(s.preview(32)[0].size))
    assert steps == [(32, 32)] * 2


def test_many_prompts_are_encoded_in_pieces(ws, machine):
    machine(stand_in())
    build(ws, max_batch=2)
    prompts = [f'a rose {i}' for i in range(11)]
    ours, half = (load_backend(ws.root, b).encode(prompts) for b in ('tensorrt', 'onnx-fp16'))
    assert ours.shape == (11, 16, 32) and np.array_equal(ours, half)


def test_new_weights_are_refitted_twice(ws, machine):
    trt = machine(stand_in())
    build(ws)
    for n in (1, 2):  # an engine that was refitted takes weights once more
        change(ws, 'unet')
        trt.built.clear()
        result = build(ws)
        assert (
            how(result) == dict.fromkeys(PARTS, 'kept') | dict(unet='refitted')
            and trt.refitted == n
            and not trt.built
        )
        assert len(files(ws.tensorrt / 'Fake_GPU-tensorrt-11.4')) == 5  # four engines and the times
        assert same(
            *(
                Generator(backends.open_backend(b, ws.onnx))('a red rose', num_inference_steps=4)
                for b in ('tensorrt', 'onnx-fp16')
            )
        )
    change(ws, 'unet')
    trt.wrong = 'weights'  # it does not take them
    assert how(build(ws))['unet'] == 'built'
    change(ws, 'unet', 'graph')
    trt.wrong = ''
    assert how(build(ws))['unet'] == 'built' and trt.refitted == 2
    assert how(build(ws, max_batch=3)) == dict.fromkeys(PARTS, 'built')


def test_kernel_times_are_reused(ws, machine):
    trt = machine(stand_in())
    build(ws)
    assert [t for _, _, t in trt.built] == [b'', b'+', b'++', b'+++']
    change(ws, 'vae_decoder', 'graph')
    trt.built.clear()
    build(ws)
    assert trt.built == [('vae_decoder', True, b'++++')]
    (ws.tensorrt / 'Fake_GPU-tensorrt-11.4' / 'timing.cache').write_bytes(b'of another driver')
    change(ws, 'vae_decoder', 'graph')
    trt.built.clear()
    build(ws)
    assert trt.built == [('vae_decoder', True, b'')]


def test_rtx_keeps_its_kernels(ws, machine):
    trt = machine(stand_in('tensorrt_rtx'))
    build(ws)
    folder = ws.tensorrt / 'Fake_GPU-tensorrt_rtx-11.4'
    assert {k: v for k, v in files(folder).items() if not k.endswith('.engine')} == {
        f'{p}.kernels': b'kernels' for p in PARTS
    }
    head = json.loads((folder / 'unet.engine').read_bytes().partition(b'\n')[0])
    assert head['refit'] and head['capabilities'] == ['CURRENT']
    trt.ran.clear()
    load_backend(ws.root, 'tensorrt')
    assert not trt.ran
    (folder / 'unet.kernels').write_bytes(b'stale')
    load_backend(ws.root, 'tensorrt')
    assert len(trt.ran) == 1 and (folder / 'unet.kernels').read_bytes() == b'kernels'


def test_an_engine_that_differs_is_rejected(ws, machine):
    trt = machine(stand_in())
    trt.wrong = 'refit'
    result = build(ws)
    assert (
        how(result) == dict.fromkeys(PARTS, 'built')
        and [r for _, r, _ in trt.built] == [True, False] * 4
        and not any(m['refit'] for m in next(iter(result.status['sets'].values()))['parts'].values())
    )
    before = files(ws.tensorrt)
    change(ws, 'unet', 'graph')
    trt.wrong = 'all'
    with pytest.raises(UserError, match=r'the engine of unet differs from its ONNX file by nan'):
        build(ws)
    assert files(ws.tensorrt) == before


def test_engines_of_other_gpus_stay_with_their_weights(ws, machine):
    machine(stand_in(), 'A')
    build(ws)
    machine(stand_in(version='12'), 'B')
    build(ws)
    assert (
        set(read_json(ws.tensorrt / 'status.json')['sets'])
        == {'A-tensorrt-11.4', 'B-tensorrt-12'}
        == {p.name for p in ws.tensorrt.iterdir() if p.is_dir()}
    )
    machine(None, '')
    assert 'GPU' in build(ws).skipped and len(list(ws.tensorrt.iterdir())) == 3
    change(ws, 'unet')
    machine(stand_in(version='12'), 'B')
    assert how(build(ws))['unet'] == 'refitted'
    assert {p.name for p in ws.tensorrt.iterdir() if p.is_dir()} == {'B-tensorrt-12'}


def test_engines_are_used_only_where_they_fit(ws, machine, monkeypatch):
    "Each reason is one line, and `auto` selects another backend."

    def asked(match, auto='torch'):
        with pytest.raises(UserError, match=match) as e:
            load_backend(ws.root, 'tensorrt')
        assert (
            '\n' not in str(e.value)
            and 'auto selects one that runs here' in str(e.value)
            and load_backend(ws.root).name == auto
        )
        left = (
            bench.bench(ws.root, steps=[1], rounds=1, names=['onnx', 'tensorrt'])['left_out']
            if match == 'no engines of this model'
            else {'tensorrt': backends.why_unavailable('tensorrt', ws.onnx)}
        )
        assert left['tensorrt'] in str(e.value)

    fast = backends.fastest_backend(ws.onnx)
    monkeypatch.setattr(bench, 'peak_memory', lambda *a: 0.0)
    trt = machine(stand_in(), 'A', 'SM86')
    asked('no engines of this model')
    build(ws)
    assert (
        load_backend(ws.root).name == load_backend(ws.onnx).name == 'tensorrt'
        and load_backend(ws.root, 'torch').name == 'torch'
    )
    with monkeypatch.context() as m:  # measured, not believed
        m.setattr(backends, 'milliseconds_per_step', lambda b: dict(torch=1).get(b.name, 2))
        assert load_backend(ws.root).name == 'torch' and load_backend(ws.onnx).name == 'tensorrt'
    machine(trt, 'B', 'SM89')
    asked(r'the engines are for A, this is B \(SM89\)')
    machine(stand_in(version='12'), 'A')
    asked('the engines need tensorrt 11.4, installed is 12')
    machine(stand_in('tensorrt_rtx'), 'A')
    asked('the engines need tensorrt 11.4, installed is none')
    import onnxruntime as ort

    with monkeypatch.context() as m:
        m.setattr(ort, 'get_available_providers', lambda: ['CUDAExecutionProvider', 'CPUExecutionProvider'])
        assert backends.auto_backends(ws.onnx) == ['torch', 'onnx']
    machine(None, 'A')
    asked('the package tensorrt is not installed')
    machine(trt, '')
    asked('PyTorch sees none here', fast)
    machine(trt, 'A')
    (ws.tensorrt / 'A-tensorrt-11.4' / 'unet.engine').write_bytes(b'broken')
    with pytest.raises(UserError, match='cannot open this engine'):
        load_backend(ws.root, 'tensorrt')
    change(ws, 'unet')
    assert 'have other weights' in backends.why_unavailable('tensorrt', ws.onnx)


def test_engines_made_ahead_run_on_their_architecture(ws, machine):
    trt = machine(stand_in('tensorrt_rtx'), '', '')
    result = build(ws, targets=['SM86'])
    assert (
        how(result, 'SM86-tensorrt_rtx-11.4') == dict.fromkeys(PARTS, 'built')
        and not any(r for _, r, _ in trt.built)
        and not trt.ran
    )
    machine(trt, 'A', 'SM86')
    assert load_backend(ws.root).name == 'tensorrt'
    machine(trt, 'A', 'SM89')
    assert 'for SM86, this is A (SM89)' in backends.why_unavailable('tensorrt', ws.onnx)
    machine(stand_in(), 'A')
    with pytest.raises(
        UserError,
        match=r'tensorrt.targets: tensorrt builds for the GPU of this machine; set tensorrt.flavour=rtx',
    ):
        build(ws)


def test_the_stage_reports_what_is_missing(ws, machine):
    machine(None, '')
    result = tensorrt.run(str(ws.root))
    status = read_json(ws.tensorrt / 'status.json')
    assert (
        not status['built']
        and status['reason'] == result.skipped
        and 'GPU' in result.skipped
        and '\n' not in result.skipped
    )
    assert read_json(ws.work / 'records' / 'tensorrt.json')['status'] == 'skipped'
    machine(None, 'NVIDIA T4')
    assert 'pip install flowerdiff[tensorrt]' in tensorrt.run(str(ws.root)).skipped


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_backend_reports_what_is_missing_here(exported):
    with pytest.raises(
        UserError,
        match=r'^backend tensorrt: (the package tensorrt is not installed|engines run on an NVIDIA GPU)'
        r'[^\n]*auto selects one that runs here$',
    ):
        load_backend(exported.root, 'tensorrt')


# ---- the loop


@pytest.mark.parametrize('name', SAMPLERS)
def test_the_loop_copies_nothing_back(exported, name):
    """The loop copies nothing back from the device.

    On the device `meta` there are no numbers, so an `.item()`, a `.cpu()` or a comparison fails.
    """
    seen = []

    class Meta:
        device = 'meta'

        def condition(self, text):
            return text

        def denoise(self, x, t, text):
            seen.append((x.device.type, t.device.type))
            return torch.empty_like(x)

    text, config = (
        torch.empty(2, 16, 32, device='meta'),
        read_json(exported.model / 'scheduler' / 'scheduler_config.json')
        | dict(_class_name='DPMSolverMultistepScheduler'),
    )
    out = sample(Meta(), text, text, generators(0, 2), load_scheduler(config, name), steps=4, guidance=4.0)
    assert out.device.type == 'meta' and len(seen) >= 4 and set(seen) == {('meta', 'meta')}
