"Exports: the ONNX folder holds the same model, in a layout that Optimum can open."

import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from test_generate import run_threads, same, with_tiny_autoencoder
from tiny import tiny_model

from flowerdiff.core.checksums import write_checksums
from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.workspace import open_workspace
from flowerdiff.drawing.onnx_graph import read_graph, split_graph
from flowerdiff.inference import backends, onnx_export, onnx_openvino
from flowerdiff.inference.backends import BACKENDS, load_backend, open_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.inference.onnx_openvino import OnnxBackend, OpenVinoBackend, onnx_session
from flowerdiff.inference.torch_backend import TorchBackend
from flowerdiff.stages import onnx as export


def export_tiny(root, autoencoder):
    "Return a workspace with a tiny model and its export."
    ws = open_workspace(root, 'garden', {'evaluate.steps': 3})
    tiny_model(ws.model)
    if autoencoder == 'tiny':
        with_tiny_autoencoder(ws.model)
    export.run(str(root))
    return ws


def input_names(session):
    return [i.name for i in session.get_inputs()]


def output_names(session):
    return [o.name for o in session.get_outputs()]


@pytest.fixture(scope='module')
def ws(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp('export') / 'ws', 'kl')


@pytest.fixture
def copy(ws, tmp_path):
    return open_workspace(shutil.copytree(ws.root, tmp_path / 'ws'))


def test_the_folder_has_the_layout_of_optimum(ws):
    parts = ('text_encoder', 'unet', 'vae_decoder', 'vae_encoder')
    files = {p.relative_to(ws.onnx).as_posix() for p in ws.onnx.glob('*/model.onnx*')}
    assert files == {f'{part}/model.onnx' for part in parts}
    for part in parts:
        assert (ws.onnx / part / 'config.json').is_file()
    assert (ws.onnx / 'scheduler' / 'scheduler_config.json').is_file()
    tokenizer = [sorted(p.name for p in (root / 'tokenizer').iterdir()) for root in (ws.onnx, ws.model)]
    assert tokenizer[0] == tokenizer[1]
    assert read_json(ws.onnx / 'model_index.json')['unet']
    sessions = {part: onnx_session(ws.onnx / part / 'model.onnx') for part in parts}
    assert input_names(sessions['unet']) == ['sample', 'timestep', 'encoder_hidden_states']
    assert output_names(sessions['unet']) == ['out_sample']
    assert sessions['unet'].get_inputs()[1].shape == []
    assert input_names(sessions['text_encoder']) == ['input_ids']
    assert output_names(sessions['text_encoder']) == ['last_hidden_state', 'pooler_output']
    assert input_names(sessions['vae_decoder']) == ['latent_sample']
    assert output_names(sessions['vae_decoder']) == ['sample']
    assert output_names(sessions['vae_encoder']) == ['latent_parameters']


def test_every_backend_uses_the_steps_of_a_student(copy, monkeypatch):
    write_json(copy.model / 'train_settings.json', dict(run_id='secret', train=dict(distill=2)))
    real = export.compare_backends
    used = []

    def compare_backends(backend, folder, prompts, settings):
        used.append(settings)
        return real(backend, folder, prompts, settings)

    monkeypatch.setattr(export, 'compare_backends', compare_backends)
    export.run(str(copy.root))
    opened = [load_backend(copy.root, name) for name in ('torch', 'onnx', 'openvino', 'auto')]
    assert {(b.steps, b.guidance) for b in opened} == {(2, 1.0)}
    assert (used[0]['num_inference_steps'], used[0]['guidance_scale']) == (2, 1.0)
    # published with the export, so it holds no more than sampling needs
    assert read_json(copy.onnx / 'train_settings.json') == dict(train=dict(distill=2))


@pytest.mark.parametrize('name', ['onnx', 'openvino'])
@pytest.mark.parametrize('n, size', [(1, None), (3, None), (2, 48)])
def test_any_batch_and_size_gives_the_same(ws, n, size, name):
    both = [
        Generator.from_pretrained(ws.root, backend=b)(
            ['a red rose', 'the sky'],
            num_images_per_prompt=n,
            size=size,
            num_inference_steps=4,
            negative_prompt='blue',
        )
        for b in ('torch', name)
    ]
    assert same(*both) and not same(both[1][:n], both[1][n:])


def test_openvino_multiplies_the_text_once_and_keeps_few_shapes(ws):
    generator = Generator.from_pretrained(ws.root, backend='openvino')
    backend = generator.backend
    products = backend.products
    batches = []

    def counted(inputs):
        batches.append(len(inputs['encoder_hidden_states']))
        return products(inputs)

    backend.products = counted
    first = generator('a red rose', num_inference_steps=5)
    assert batches == [2]
    computed = products({'encoder_hidden_states': np.zeros((1, 16, 32), np.float32)})
    unet = TorchBackend(ws.model, 'cpu').unet
    assert len(computed) == 2 * sum('attn2.to_k' in name for name, _ in unet.named_parameters())
    for size in (16, 24, 40, 48):
        generator('a red rose', num_inference_steps=1, size=size)
    assert len(backend.unet.compiled) == 3
    assert same(first, generator('a red rose', num_inference_steps=5))


def count_text_products(graph):
    model = onnx.load_from_string(graph.serialize())
    return sum('attn2/to_k' in node.name or 'attn2/to_v' in node.name for node in model.graph.node)


@pytest.mark.parametrize('variant', ['', 'fp16', 'int8'])
def test_the_split_graph_gives_identical_results(ws, variant):
    backend = OnnxBackend(ws.onnx, variant)
    file = onnx_openvino.variant_file(ws.onnx / 'unet', variant)
    whole = onnx_session(file)
    assert backend.products and 'encoder_hidden_states' not in backend.inputs
    graph = read_graph(file)
    before = count_text_products(graph)
    products, rest = split_graph(graph)
    assert before
    assert (count_text_products(rest), count_text_products(products)) == (0, before)
    assert not set(rest.constants) & set(products.constants) & set(graph.weights)
    text = backend.encode(['a red rose', 'the sky', ''])
    for n, t in ((1, 999), (3, 500), (2, 0)):
        z = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(n)).numpy()
        inputs = dict(sample=z, timestep=np.asarray(t), encoder_hidden_states=text[:n])
        [want] = whole.run(['out_sample'], inputs)
        assert np.array_equal(backend.denoise(z, t, backend.condition(text[:n])), want)


@pytest.mark.parametrize('variant', ['', 'fp16', 'int8'])
def test_onnx_computes_the_text_part_once_per_image(ws, variant):
    backend = OnnxBackend(ws.onnx, variant)
    condition = backend.condition
    batches = []

    def counted(text):
        batches.append(len(text))
        return condition(text)

    backend.condition = counted
    Generator(backend)('a red rose', num_inference_steps=5)
    assert batches == [2]


def test_onnx_with_its_weights_in_a_second_file(copy):
    "A file above two gigabytes has its weights in a second file."
    import onnx

    before = Generator.from_pretrained(copy.root, backend='onnx')('a red rose', num_inference_steps=3)
    unet = copy.onnx / 'unet' / 'model.onnx'
    model = onnx.load(unet)
    onnx.save(model, unet, save_as_external_data=True, location='model.onnx_data', size_threshold=1024)
    write_checksums(copy.onnx)
    generator = Generator.from_pretrained(copy.root, backend='onnx')
    assert (unet.parent / 'model.onnx_data').stat().st_size > unet.stat().st_size
    assert generator.backend.products
    assert same(before, generator('a red rose', num_inference_steps=3))


def test_onnx_with_a_graph_within_the_graph(copy):
    "A graph that cannot be split runs as it is."
    import onnx

    before = Generator.from_pretrained(copy.root, backend='onnx')('a red rose', num_inference_steps=3)
    unet = copy.onnx / 'unet' / 'model.onnx'
    model = onnx.load(unet)
    chosen = onnx.helper.make_tensor_value_info('chosen', 1, None)
    identity = onnx.helper.make_node('Identity', ['sample'], ['chosen'])
    branch = onnx.helper.make_graph([identity], 'branch', [], [chosen])
    condition = onnx.helper.make_node('If', ['yes'], ['unused'], then_branch=branch, else_branch=branch)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), 'yes'))
    model.graph.node.insert(0, condition)
    onnx.save(model, unet)
    write_checksums(copy.onnx)
    generator = Generator.from_pretrained(copy.root, backend='onnx')
    assert generator.backend.products is None
    assert 'encoder_hidden_states' in generator.backend.inputs
    assert same(before, generator('a red rose', num_inference_steps=3))


def test_a_unet_that_does_not_use_its_text_runs_on_all_backends(tmp_path):
    from diffusers import UNet2DConditionModel

    ws = open_workspace(tmp_path / 'ws', 'garden', {'evaluate.steps': 3})
    tiny_model(ws.model)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=('DownBlock2D',) * 2,
        up_block_types=('UpBlock2D',) * 2,
        mid_block_type=None,
        cross_attention_dim=32,
        norm_num_groups=8,
    ).save_pretrained(ws.model / 'unet')
    export.run(str(ws.root))
    settings = dict(num_images_per_prompt=2, num_inference_steps=4)
    by_torch, by_onnx, by_openvino = (
        Generator.from_pretrained(ws.root, backend=name)('a red rose', **settings)
        for name in ('torch', 'onnx', 'openvino')
    )
    assert same(by_torch, by_onnx) and same(by_torch, by_openvino)
    assert not same(by_torch[:1], by_torch[1:])


def test_openvino_in_threads(ws):
    generator = Generator.from_pretrained(ws.root, backend='openvino')
    alone = [generator('a red rose', seed=i, num_inference_steps=4) for i in range(3)]
    images = {}

    def generate(i):
        images[i] = generator('a red rose', seed=i, num_inference_steps=4)

    run_threads([partial(generate, i) for i in range(3)])
    assert all(same(alone[i], images[i]) for i in range(3))
    assert not same(alone[0], alone[1])


@pytest.mark.parametrize('name, least', [('onnx-fp16', 45), ('onnx-int8', 30), ('openvino-bf16', 30)])
def test_fewer_bits_give_nearly_the_same(ws, name, least):
    reason = backends.why_unavailable(name)
    if reason:
        pytest.skip(reason)
    full, small = (
        Generator(open_backend(k, ws.onnx))(['a red rose', 'the sky'], num_inference_steps=4)
        for k in ('onnx', name)
    )
    difference = export.picture_difference(full, small)
    assert least < difference['psnr'] < 100, difference


def test_a_black_picture_is_not_hidden_by_identical_ones():
    "The mean of the decibels of these four pictures is 77, and 75 % of all pixel values are the same."
    rng = np.random.default_rng(0)
    good = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
    difference = export.picture_difference(good, [*good[:3], Image.new('RGB', (16, 16))])
    assert difference['within_1'] < 0.05 and difference['psnr'] < 10
    assert difference['psnr_median'] == 100
    assert not export.similar_pictures(difference)
    assert not export.same_pictures(difference)


def test_parity_counts_pixels_in_each_picture():
    "Over all five pictures, 99.95 % of the values are within 1; in the last one 99.75 %."
    good = [Image.new('RGB', (20, 20), (100, 100, 100)) for _ in range(5)]
    pixels = np.full((20, 20, 3), 100, np.uint8)
    pixels[0, 0] = 103
    difference = export.picture_difference(good, [*good[:4], Image.fromarray(pixels)])
    assert difference['within_1'] == 1 - 1 / 400 and difference['worst'] == 3
    assert not export.same_pictures(difference)


def test_an_autoencoder_tiny_is_exported_too(tmp_path):
    ws = export_tiny(tmp_path / 'ws', 'tiny')
    assert output_names(onnx_session(ws.onnx / 'vae_encoder' / 'model.onnx')) == ['latent_sample']
    settings = dict(num_images_per_prompt=2, num_inference_steps=4)
    by_torch, by_onnx = (
        Generator.from_pretrained(ws.root, backend=name)('a red rose', **settings)
        for name in ('torch', 'onnx')
    )
    assert same(by_torch, by_onnx)


def test_parity_is_written(ws):
    parity = read_json(ws.onnx / 'parity.json')
    parts = parity['parts'].values()
    measured = parity['backends']
    assert parity['passed']
    assert all(part['difference'] < 1e-3 for part in parts)
    assert all(part['fp16'] < part['bytes'] for part in parts)
    available = {k for k in BACKENDS if k != 'torch-compile' and not backends.why_unavailable(k)}
    assert set(measured) == available
    for name in ('torch', 'onnx', 'openvino'):
        assert measured[name]['keeps'] and measured[name]['within_1'] >= 0.999
    assert min(record['milliseconds'] for record in measured.values()) > 0


def test_auto_selects_the_fastest_that_keeps_the_quality(copy, monkeypatch):
    parity = read_json(copy.onnx / 'parity.json')
    measured = parity['backends']

    def auto(where=copy.root, bad=(), **milliseconds):
        changed = {
            name: record | dict(milliseconds=milliseconds.get(name, 9.0), keeps=name not in bad)
            for name, record in measured.items()
        }
        write_json(copy.onnx / 'parity.json', parity | dict(backends=changed))
        write_checksums(copy.onnx)
        return load_backend(where).name

    for name in ('torch', 'onnx', 'openvino'):
        assert auto(**{name: 1.0}) == name
    assert auto(openvino=1.0, onnx=2.0, bad=('openvino',)) == 'onnx'
    assert auto(copy.onnx, torch=1.0, onnx=2.0) == 'onnx'
    for module in (backends, onnx_openvino):
        monkeypatch.setattr(module, 'why_not_openvino', lambda precision='f32': 'not installed')
    assert auto(openvino=1.0, onnx=2.0) == 'onnx'
    with pytest.raises(UserError, match='backend openvino: not installed'):
        load_backend(copy.root, 'openvino')
    assert load_backend(copy.root, 'onnx').name == 'onnx'
    assert load_backend(copy.root, 'torch').name == 'torch'
    for name in ('torch', 'torch-compile'):
        with pytest.raises(UserError, match='ONNX files only'):
            load_backend(copy.onnx, name)


def test_an_export_of_other_weights_is_not_used(copy):
    path = copy.model / 'unet' / 'diffusion_pytorch_model.safetensors'
    changed = bytearray(path.read_bytes())
    changed[-2] ^= 1
    path.write_bytes(changed)
    assert load_backend(copy.root).name == 'torch'
    with pytest.raises(UserError, match='no ONNX export of these weights'):
        load_backend(copy.root, 'onnx')


def shift_outputs(monkeypatch, part_name):
    "Make the export of one part compute wrong outputs."
    export_part = export.export_part

    class Shifted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *inputs):
            return self.inner(*inputs) * 1.01

    def wrong(part, folder, opset=17):
        if folder.name == part_name:
            part = onnx_export.Part(Shifted(part.fn), part.inputs, part.outputs, part.axes)
        return export_part(part, folder, opset)

    monkeypatch.setattr(export, 'export_part', wrong)


def shift_pixels(monkeypatch):
    "Make the ONNX backend decode wrong pixels."
    decode = OnnxBackend.decode
    monkeypatch.setattr(OnnxBackend, 'decode', lambda self, latents: decode(self, latents) + 0.1)


@pytest.mark.parametrize('what', ['wrong part', 'wrong picture'])
def test_a_wrong_export_fails_and_keeps_the_old_folder(copy, monkeypatch, what):
    before = {p: p.read_bytes() for p in copy.onnx.rglob('*') if p.is_file()}
    if what == 'wrong part':
        shift_outputs(monkeypatch, 'vae_encoder')
        message = 'vae_encoder differs by'
    else:
        shift_pixels(monkeypatch)
        message = 'of pixel values are within 1'
    with pytest.raises(UserError, match=message):
        export.run(str(copy.root))
    assert before == {p: p.read_bytes() for p in copy.onnx.rglob('*') if p.is_file()}
    assert not [p for p in copy.root.iterdir() if 'tmp' in p.name]


@pytest.mark.parametrize('kind', [OnnxBackend, OpenVinoBackend])
@pytest.mark.parametrize('part', ['unet', 'text_encoder', 'vae_decoder'])
def test_a_broken_export_gets_one_line(copy, part, kind, capfd):
    path = copy.onnx / part / 'model.onnx'
    for bad in (b'', b'PK\x03\x04 a zip', path.read_bytes()[:2000], None):
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        write_checksums(copy.onnx)  # else the checksum is what is noticed
        with pytest.raises(UserError) as e:
            kind(copy.onnx)
        assert not capfd.readouterr().err  # the libraries print nothing
        assert '\n' not in str(e.value) and str(path.parent) in str(e.value)


def test_big_weights_are_gathered_in_one_file(ws, tmp_path):
    "An exporter may write many weight files. They become one, and nothing is lost."
    import onnx

    part = onnx_export.model_parts(TorchBackend(ws.model))['unet']
    path = onnx_export.export_part(part, tmp_path / 'unet')
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64)
    assert len(list(path.parent.iterdir())) > 3
    onnx_export.gather_weights(path, limit=0)
    assert sorted(p.name for p in path.parent.iterdir()) == ['model.onnx', 'model.onnx_data']
    shutil.move(path.parent, tmp_path / 'moved')
    moved = tmp_path / 'moved' / 'model.onnx'
    assert onnx_export.part_difference(part, moved) < 1e-3
    onnx_export.gather_weights(moved)
    assert [p.name for p in moved.parent.iterdir()] == ['model.onnx']
    assert onnx_export.part_difference(part, moved) < 1e-3


OTHER_PIPELINES = """import sys, torch
from diffusers import StableDiffusionPipeline
from optimum.onnxruntime import ORTDiffusionPipeline

model, onnx, out, size = sys.argv[1:]
pipelines = dict(torch=(StableDiffusionPipeline, model), onnx=(ORTDiffusionPipeline, onnx))
for name, (cls, folder) in pipelines.items():
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ['a red rose'] * 2,
        num_inference_steps=4,
        guidance_scale=4.0,
        height=int(size),
        width=int(size),
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    for i, image in enumerate(images):
        image.save(f'{out}/{name}{i}.png')"""


@pytest.mark.skipif(
    'FLOWERDIFF_OPTIMUM_PYTHON' not in os.environ,
    reason='FLOWERDIFF_OPTIMUM_PYTHON names the python of an environment with Optimum, and so transformers 4',
)
def test_diffusers_with_transformers_4_and_optimum_give_the_same(ws, tmp_path):
    from PIL import Image

    python = os.environ['FLOWERDIFF_OPTIMUM_PYTHON']
    arguments = [str(ws.model), str(ws.onnx), str(tmp_path), '32']
    subprocess.run([python, '-c', OTHER_PIPELINES, *arguments], check=True)
    generator = Generator.from_pretrained(ws.root, 'torch')
    ours = generator('a red rose', num_images_per_prompt=2, seed=3, num_inference_steps=4)
    assert not same(ours[:1], ours[1:])
    for name in ('torch', 'onnx'):
        assert same([Image.open(tmp_path / f'{name}{i}.png') for i in (0, 1)], ours), name


def test_bench_leaves_out_a_backend_that_fails_at_its_first_image(ws, monkeypatch):
    from flowerdiff.inference.benchmark import bench

    def broken(self, *a):
        raise UserError('backend onnx: its compiler is broken')

    monkeypatch.setattr(OnnxBackend, 'denoise', broken)
    result = bench(ws.root, steps=[1], rounds=1, names=['torch', 'onnx'])
    assert list(result['backends']) == ['torch']
    assert result['left_out'] == dict(onnx='backend onnx: its compiler is broken')
    with pytest.raises(UserError, match='its compiler is broken'):
        bench(ws.root, steps=[1], rounds=1, names=['onnx'])


HEAVY = ('torch', 'diffusers', 'transformers', 'scipy', 'pydantic', 'fastcore', 'onnx', 'huggingface_hub')


@pytest.mark.parametrize('backend', ['onnx', 'openvino', 'torch'])
def test_the_command_generate_imports_no_pytorch_for_a_runtime(ws, tmp_path, backend):
    "The backend torch shows that the check would notice."
    code = (
        'import sys; from flowerdiff.pipeline.cli import main; '
        f'print(main(sys.argv[1:]), [m for m in {HEAVY} if m in sys.modules])'
    )
    line = [
        'generate',
        'a red rose',
        '-m',
        ws.root,
        '--steps',
        '2',
        '--backend',
        backend,
        '-q',
        '-o',
        tmp_path,
    ]
    p = subprocess.run([sys.executable, '-c', code, *map(str, line)], capture_output=True, text=True)
    status, _, imported = p.stdout.strip().partition(' ')
    assert status == '0' and (tmp_path / 'a-red-rose.png').is_file(), p.stderr
    assert ('torch' in imported and 'diffusers' in imported) if backend == 'torch' else imported == '[]'


@pytest.mark.parametrize('name', [None, 'ddim', 'ddpm', 'euler', 'lcm', 'unipc'])
def test_the_runtimes_draw_what_pytorch_draws(ws, name):
    "Noise, samplers, batches, and a picture to start from, at whole timesteps, which ONNX needs."
    backends = [Generator(TorchBackend(ws.model, 'cpu')), Generator(OnnxBackend(ws.onnx), batch=2)]
    settings = dict(num_images_per_prompt=3, num_inference_steps=4, scheduler=name, size=(48, 32), seed=2**33)
    ours, theirs = (g(['a red rose'], **settings) for g in backends)
    assert same(ours, theirs) and not same(ours[:1], ours[1:2])
    again = [
        g('the sky', image=ours[0], strength=0.5, num_inference_steps=4, scheduler=name) for g in backends
    ]
    assert same(*again) and again[0].settings[0].strength == 0.5
    mixed = [g('the sky', variation_seed=3, num_inference_steps=2, scheduler=name) for g in backends]
    assert same(*mixed)
