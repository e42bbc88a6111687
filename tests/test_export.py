"Exports: the ONNX folder is the same model and opens where Optimum's do."

import os
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from test_generate import same, with_tiny_autoencoder
from tiny import tiny_model

from flowerdiff.core.schema import UserError
from flowerdiff.core.workspace import open_workspace, read_json, write_json
from flowerdiff.inference import backends
from flowerdiff.inference import onnx_openvino as runtimes
from flowerdiff.inference.backends import BACKENDS, load_backend, open_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.inference.onnx_openvino import OnnxBackend, OpenVinoBackend, onnx_session
from flowerdiff.inference.torch_backend import TorchBackend
from flowerdiff.stages import onnx as export


def make(root, autoencoder):
    ws = open_workspace(root, 'garden', {'evaluate.steps': 3})
    tiny_model(ws.model)
    if autoencoder == 'tiny':
        with_tiny_autoencoder(ws.model)
    export.run(str(root))
    return ws


@pytest.fixture(scope='module')
def ws(tmp_path_factory):
    return make(tmp_path_factory.mktemp('export') / 'ws', 'kl')


@pytest.fixture
def copy(ws, tmp_path):
    return open_workspace(shutil.copytree(ws.root, tmp_path / 'ws'))


def test_the_folder_is_optimums(ws):
    assert {p.relative_to(ws.onnx).as_posix() for p in ws.onnx.glob('*/model.onnx*')} == {
        f'{p}/model.onnx' for p in ('text_encoder', 'unet', 'vae_decoder', 'vae_encoder')
    }
    for part in ('unet', 'vae_decoder', 'vae_encoder', 'text_encoder'):
        assert (ws.onnx / part / 'config.json').is_file()
    assert (
        (ws.onnx / 'scheduler' / 'scheduler_config.json').is_file()
        and sorted(p.name for p in (ws.onnx / 'tokenizer').iterdir())
        == sorted(p.name for p in (ws.model / 'tokenizer').iterdir())
        and read_json(ws.onnx / 'model_index.json')['unet']
    )
    ins, outs = (
        lambda p: {i.name: i for i in onnx_session(ws.onnx / p / 'model.onnx').get_inputs()},
        lambda p: [o.name for o in onnx_session(ws.onnx / p / 'model.onnx').get_outputs()],
    )
    assert (
        list(ins('unet')) == ['sample', 'timestep', 'encoder_hidden_states']
        and outs('unet') == ['out_sample']
        and ins('unet')['timestep'].shape == []
    )
    assert list(ins('text_encoder')) == ['input_ids'] and outs('text_encoder') == [
        'last_hidden_state',
        'pooler_output',
    ]
    assert (
        list(ins('vae_decoder')) == ['latent_sample']
        and outs('vae_decoder') == ['sample']
        and outs('vae_encoder') == ['latent_parameters']
    )


def test_a_student_is_drawn_as_one_by_every_backend(copy, monkeypatch):
    write_json(copy.model / 'train_settings.json', dict(run_id='secret', train=dict(distill=2)))
    real, asked = export.compare_backends, []
    monkeypatch.setattr(export, 'compare_backends', lambda *a: asked.append(a[3]) or real(*a))
    export.run(str(copy.root))
    opened = {name: load_backend(copy.root, name) for name in ('torch', 'onnx', 'openvino', 'auto')}
    assert {(b.steps, b.guidance) for b in opened.values()} == {(2, 1.0)} and (
        asked[0]['steps'],
        asked[0]['guidance'],
    ) == (2, 1.0)
    assert read_json(copy.onnx / 'train_settings.json') == dict(
        train=dict(distill=2)
    )  # published with it: no more than drawing needs


@pytest.mark.parametrize('name', ['onnx', 'openvino'])
@pytest.mark.parametrize('n, size', [(1, None), (3, None), (2, 48)])
def test_any_batch_and_size_draws_the_same(ws, n, size, name):
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
    g = Generator.from_pretrained(ws.root, backend='openvino')
    b, asked = g.backend, []
    products = b.products
    b.products = lambda feed: asked.append(len(feed['encoder_hidden_states'])) or products(feed)
    first = g('a red rose', num_inference_steps=5)
    assert asked == [2] and len(
        products({'encoder_hidden_states': np.zeros((1, 16, 32), np.float32)})
    ) == 2 * sum('attn2.to_k' in k for k, _ in TorchBackend(ws.model, 'cpu').unet.named_parameters())
    for size in (16, 24, 40, 48):
        g('a red rose', num_inference_steps=1, size=size)
    assert len(b.unet.made) == 3 and same(first, g('a red rose', num_inference_steps=5))


@pytest.mark.parametrize('variant', ['', 'fp16', 'int8'])
def test_onnx_multiplies_the_text_once_and_bit_for_bit(ws, variant):
    b = OnnxBackend(ws.onnx, variant)
    whole = onnx_session(runtimes.variant_file(ws.onnx / 'unet', variant))
    assert b.products and 'encoder_hidden_states' not in b.inputs
    ops = lambda session: sum('attn2/to_k' in n.name or 'attn2/to_v' in n.name for n in session)

    model, weights = runtimes.read_graph(runtimes.variant_file(ws.onnx / 'unet', variant))
    before = ops(model.graph.node)
    products = runtimes.split_onnx(model)
    assert (
        before
        and (ops(model.graph.node), ops(products.graph.node)) == (0, before)
        and not {i.name for i in model.graph.initializer if i.name in weights}
        & {i.name for i in products.graph.initializer}
    )
    text, asked = b.encode(['a red rose', 'the sky', '']), []
    for n, t in ((1, 999), (3, 500), (2, 0)):
        z = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(n))
        want = whole.run(
            ['out_sample'],
            dict(sample=z.numpy(), timestep=np.asarray(t), encoder_hidden_states=text[:n].numpy()),
        )[0]
        assert np.array_equal(b.denoise(z, torch.tensor(t), b.condition(text[:n])).numpy(), want)
    g, condition = Generator(b), b.condition
    b.condition = lambda text: asked.append(len(text)) or condition(text)
    g('a red rose', num_inference_steps=5)
    assert asked == [2]


def test_onnx_with_its_weights_beside_it_and_a_graph_within_the_graph(copy):
    "A file above two gigabytes keeps its weights outside; a graph that cannot be cut runs as it is."
    import onnx

    before = Generator.from_pretrained(copy.root, backend='onnx')('a red rose', num_inference_steps=3)
    unet = copy.onnx / 'unet' / 'model.onnx'
    model = onnx.load(unet)
    onnx.save(
        onnx.load(unet), unet, save_as_external_data=True, location='model.onnx_data', size_threshold=1024
    )
    g = Generator.from_pretrained(copy.root, backend='onnx')
    assert (
        (unet.parent / 'model.onnx_data').stat().st_size > unet.stat().st_size
        and g.backend.products
        and same(before, g('a red rose', num_inference_steps=3))
    )
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node('Identity', ['sample'], ['chosen'])],
        'branch',
        [],
        [onnx.helper.make_tensor_value_info('chosen', 1, None)],
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), 'yes'))
    model.graph.node.insert(
        0, onnx.helper.make_node('If', ['yes'], ['unused'], then_branch=branch, else_branch=branch)
    )
    onnx.save(model, unet)
    g = Generator.from_pretrained(copy.root, backend='onnx')
    assert (
        g.backend.products is None
        and 'encoder_hidden_states' in g.backend.inputs
        and same(before, g('a red rose', num_inference_steps=3))
    )


def test_a_unet_that_does_not_read_its_text_is_exported_and_drawn_by_all(tmp_path):
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
    drawn = [
        Generator.from_pretrained(ws.root, backend=b)(
            'a red rose', num_images_per_prompt=2, num_inference_steps=4
        )
        for b in ('torch', 'onnx', 'openvino')
    ]
    assert same(drawn[0], drawn[1]) and same(drawn[0], drawn[2]) and not same(drawn[0][:1], drawn[0][1:])


def test_openvino_in_threads(ws):
    g = Generator.from_pretrained(ws.root, backend='openvino')
    alone, seen = [g('a red rose', seed=i, num_inference_steps=4) for i in range(3)], {}

    def visit(i):
        seen[i] = g('a red rose', seed=i, num_inference_steps=4)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(same(alone[i], seen[i]) for i in range(3)) and not same(alone[0], alone[1])


@pytest.mark.parametrize('name, least', [('onnx-fp16', 45), ('onnx-int8', 30), ('openvino-bf16', 30)])
def test_what_saves_bits_draws_nearly_the_same(ws, name, least):
    if reason := backends.why_unavailable(name):
        pytest.skip(reason)
    full, small = (
        Generator(open_backend(k, ws.onnx))(['a red rose', 'the sky'], num_inference_steps=4)
        for k in ('onnx', name)
    )
    d = export.picture_difference(full, small)
    assert least < d['psnr'] < 100, d


def test_an_autoencoder_tiny_is_exported_too(tmp_path):
    ws = make(tmp_path / 'ws', 'tiny')
    assert [o.name for o in onnx_session(ws.onnx / 'vae_encoder' / 'model.onnx').get_outputs()] == [
        'latent_sample'
    ]
    assert same(
        *[
            Generator.from_pretrained(ws.root, backend=b)(
                'a red rose', num_images_per_prompt=2, num_inference_steps=4
            )
            for b in ('torch', 'onnx')
        ]
    )


def test_parity_is_written_and_auto_takes_the_fastest_that_is_good(copy, monkeypatch):
    parity = read_json(copy.onnx / 'parity.json')
    b = parity['backends']
    assert (
        parity['passed']
        and all(p['difference'] < 1e-3 for p in parity['parts'].values())
        and set(b) == {k for k in BACKENDS if k != 'torch-compile' and not backends.why_unavailable(k)}
    )
    assert (
        all(b[k]['keeps'] and b[k]['within_1'] >= 0.999 for k in ('torch', 'onnx', 'openvino'))
        and min(v['milliseconds'] for v in b.values()) > 0
    )
    assert all(p['fp16'] < p['bytes'] for p in parity['parts'].values())

    def auto(where=copy.root, bad=(), **ms):
        write_json(
            copy.onnx / 'parity.json',
            parity
            | dict(
                backends={k: v | dict(milliseconds=ms.get(k, 9.0), keeps=k not in bad) for k, v in b.items()}
            ),
        )
        return load_backend(where).name

    assert [auto(**{k: 1.0}) for k in ('torch', 'onnx', 'openvino')] == ['torch', 'onnx', 'openvino']
    assert (
        auto(openvino=1.0, onnx=2.0, bad=('openvino',)) == 'onnx'
        and auto(copy.onnx, torch=1.0, onnx=2.0) == 'onnx'
    )
    for module in (backends, runtimes):
        monkeypatch.setattr(module, 'why_not_openvino', lambda precision='f32': 'not installed')
    assert auto(openvino=1.0, onnx=2.0) == 'onnx'
    with pytest.raises(UserError, match='backend openvino: not installed'):
        load_backend(copy.root, 'openvino')
    assert load_backend(copy.root, 'onnx').name == 'onnx' and load_backend(copy.root, 'torch').name == 'torch'
    for name in ('torch', 'torch-compile'):
        with pytest.raises(UserError, match='ONNX files only'):
            load_backend(copy.onnx, name)


def test_an_export_of_other_weights_is_not_used(copy):
    path = copy.model / 'unet' / 'diffusion_pytorch_model.safetensors'
    changed = bytearray(path.read_bytes())
    changed[-2] ^= 1
    path.write_bytes(changed)
    assert load_backend(copy.root).name == 'torch'
    with pytest.raises(UserError, match='made from these weights'):
        load_backend(copy.root, 'onnx')


@pytest.mark.parametrize('what', ['wrong part', 'wrong picture'])
def test_the_stage_fails_and_keeps_the_old_when_it_is_not_the_same(copy, monkeypatch, what):
    before = {p: p.read_bytes() for p in copy.onnx.rglob('*') if p.is_file()}
    if what == 'wrong part':
        right = export.export_part

        def wrong(part, folder, opset=17):
            if folder.name == 'vae_encoder':

                class Shifted(torch.nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.inner = part.fn

                    def forward(self, *xs):
                        return self.inner(*xs) * 1.01

                part = export.Part(Shifted(), part.inputs, part.outputs, part.axes)
            return right(part, folder, opset)

        monkeypatch.setattr(export, 'export_part', wrong)
    else:
        monkeypatch.setattr(OnnxBackend, 'decode', lambda self, z, f=OnnxBackend.decode: f(self, z) + 0.1)
    with pytest.raises(
        UserError, match='vae_encoder differs by' if what == 'wrong part' else 'the picture has'
    ):
        export.run(str(copy.root))
    assert before == {p: p.read_bytes() for p in copy.onnx.rglob('*') if p.is_file()}
    assert not [p for p in copy.root.iterdir() if 'tmp' in p.name]


@pytest.mark.parametrize('kind', [OnnxBackend, OpenVinoBackend])
@pytest.mark.parametrize('part', ['unet', 'text_encoder', 'vae_decoder'])
def test_a_broken_export_gets_one_line(copy, part, kind, capfd):
    path = copy.onnx / part / 'model.onnx'
    for bad in (b'', b'PK\x03\x04 a zip', path.read_bytes()[:2000], None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(UserError) as e:
            kind(copy.onnx)
        assert not capfd.readouterr().err  # what a library says by itself
        assert '\n' not in str(e.value) and str(path.parent) in str(e.value)


def test_big_weights_travel_in_one_file(ws, tmp_path):
    "What an exporter leaves in many files beside the model ends in one; nothing is lost."
    import onnx

    part = export.parts_of(TorchBackend(ws.model))['unet']
    path = export.export_part(part, tmp_path / 'unet')
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64
    )
    assert len(list(path.parent.iterdir())) > 3
    export.gather_weights(path, limit=0)
    assert sorted(p.name for p in path.parent.iterdir()) == ['model.onnx', 'model.onnx_data']
    shutil.move(path.parent, tmp_path / 'moved')
    assert export.part_difference(part, tmp_path / 'moved' / 'model.onnx') < 1e-3
    export.gather_weights(tmp_path / 'moved' / 'model.onnx')
    assert [p.name for p in (tmp_path / 'moved').iterdir()] == ['model.onnx'] and export.part_difference(
        part, tmp_path / 'moved' / 'model.onnx'
    ) < 1e-3


OTHERS = """import sys, torch
from diffusers import StableDiffusionPipeline
from optimum.onnxruntime import ORTDiffusionPipeline
for name, cls, folder in (('torch', StableDiffusionPipeline, sys.argv[1]), ('onnx', ORTDiffusionPipeline, sys.argv[2])):
    pipe = cls.from_pretrained(folder); pipe.set_progress_bar_config(disable=True); size = int(sys.argv[4])
    made = pipe(["a red rose"]*2, num_inference_steps=4, guidance_scale=4., height=size, width=size, generator=[torch.Generator().manual_seed(s) for s in (3, 4)]).images
    for i, p in enumerate(made): p.save(f"{sys.argv[3]}/{name}{i}.png")"""


@pytest.mark.skipif(
    'FLOWERDIFF_OPTIMUM_PYTHON' not in os.environ,
    reason='FLOWERDIFF_OPTIMUM_PYTHON names the python of an environment with Optimum, and so transformers 4',
)
def test_diffusers_with_transformers_4_and_optimum_draw_the_same(ws, tmp_path):
    from PIL import Image

    subprocess.run(
        [
            os.environ['FLOWERDIFF_OPTIMUM_PYTHON'],
            '-c',
            OTHERS,
            str(ws.model),
            str(ws.onnx),
            str(tmp_path),
            '32',
        ],
        check=True,
    )
    ours = Generator.from_pretrained(ws.root, 'torch')(
        'a red rose', num_images_per_prompt=2, seed=3, num_inference_steps=4
    )
    assert not same(ours[:1], ours[1:])
    for name in ('torch', 'onnx'):
        assert same([Image.open(tmp_path / f'{name}{i}.png') for i in (0, 1)], ours), name


def test_bench_leaves_out_what_fails_at_its_first_picture(ws, monkeypatch):
    from flowerdiff.inference.benchmark import bench

    def broken(self, *a):
        raise UserError('backend onnx: its compiler is broken')

    monkeypatch.setattr(OnnxBackend, 'denoise', broken)
    seen = bench(ws.root, steps=[1], rounds=1, names=['torch', 'onnx'])
    assert list(seen['backends']) == ['torch'] and seen['left_out'] == dict(
        onnx='backend onnx: its compiler is broken'
    )
    with pytest.raises(UserError, match='its compiler is broken'):
        bench(ws.root, steps=[1], rounds=1, names=['onnx'])
