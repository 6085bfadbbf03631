"""Notebook 00, the page, computes what vqvae.py and var.py do. All committed notebooks follow the rules of
run.py, and notebooks/README.md leads to their sections.

CI also runs them: python notebooks/run.py (manually, with another seed: --seed 100)
"""
import ast
import base64
import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import judge
import run
from sample import to_uint8
from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig

PAGE, *WALKTHROUGHS = sorted(HERE.glob('0*.ipynb'))
SOLUTIONS = sorted(HERE.glob('assignments/solutions/*.ipynb'))
CIFAR10 = HERE.parents[1] / 'shared' / 'data' / 'cifar10'


@pytest.mark.parametrize('path', [PAGE] + WALKTHROUGHS + SOLUTIONS, ids=lambda path: path.stem)
def test_a_committed_notebook_has_run_and_keeps_the_rules(path):
    assert run.problems(nbformat.read(path, as_version=4)) == []
    assert len(WALKTHROUGHS) == len(SOLUTIONS) == 5


@pytest.mark.parametrize('path', sorted(HERE.glob('assignments/A*.ipynb')), ids=lambda path: path.stem)
def test_no_stub_has_a_line_of_the_projects_code(path):
    assert run.copied_lines(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize('path', WALKTHROUGHS, ids=lambda path: path.stem)
def test_every_prediction_is_answered_before_the_next_is_asked_for(path):
    text = '\n'.join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    asked, *parts = text.split('**Predict.**')
    assert len(parts) >= 5 and '<details>' not in asked
    summary = '<details><summary>What came out</summary>\n\n'
    assert all(part.count(summary) == part.count('\n\n</details>') == 1 for part in parts)


def test_readmes_picture_of_the_residual_loop_is_that_of_01():
    drawn = [output.data['image/png'] for cell in nbformat.read(WALKTHROUGHS[0], as_version=4).cells
             for output in cell.get('outputs', []) if 'data' in output and 'image/png' in output.data]
    assert base64.b64decode(drawn[1]) == (HERE / 'images' / 'residual-loop.png').read_bytes()


# ------------------------------------------------------------------------------------------- VAR on one page
def code_of_the_page() -> list[str]:
    return [cell.source for cell in nbformat.read(PAGE, as_version=4).cells if cell.cell_type == 'code']


def only_defines(source: str) -> bool:
    kinds = ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef
    return all(isinstance(statement, kinds) for statement in ast.parse(source).body)


@pytest.fixture
def page(monkeypatch) -> dict:
    """The names of the page's cells that only define, and the functions of the cell that trains."""
    monkeypatch.setattr(sys, 'path', [*sys.path])
    names, sources = {}, code_of_the_page()
    assert [only_defines(source) for source in sources] == [True, True, False, True, False, False]
    functions = [node for node in ast.parse(sources[2]).body if isinstance(node, ast.FunctionDef)]
    for source in (*sources[:2], ast.unparse(ast.Module(functions, [])), sources[3]):
        exec(source, names)
    torch.manual_seed(0)
    return names


def test_the_page_has_at_most_100_lines_of_code_of_normal_width_and_imports_one_function_of_ours():
    lines, imported = [], set()
    for source in code_of_the_page():
        lines += [line for line in source.splitlines() if line.strip() and not line.strip().startswith('#')]
        nodes = list(ast.walk(ast.parse(source)))
        starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
        assert len(starts) == len({*starts})                                # one statement a line
        imported |= {f'{getattr(node, "module", "")}.{alias.name}' for node in nodes
                     if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    libraries = {'.sys', '.torch', '.torch.nn.functional', 'torch.nn', 'PIL.Image'}
    assert imported == libraries | {'train.draw_shapes'}


def twins(page: dict) -> tuple:
    """The page's two networks, and the project's with the same weights. The decoders differ."""
    ours, theirs = VQVAE(VQVAEConfig()), page['Tokenizer']()
    theirs.codebook = ours.codebook
    theirs.phis.load_state_dict(ours.phis.state_dict())
    var = VAR(VARConfig(page['BLOCKS'], 10, 256, 16, (1, 2, 4, 8), unit_norm=False)).requires_grad_(False)
    for weight in var.parameters():
        weight.normal_(std=0.1)
    for weight in var.head_adaln.parameters():                              # the page has no AdaLN there
        weight.zero_()
    transformer = page['Transformer']().requires_grad_(False)
    for name in ('class_embedding', 'word_embedding', 'head'):
        setattr(transformer, name, getattr(var, name))
    transformer.position.copy_(var.positions()[0])
    transformer.position[0] += var.start_position[0, 0]
    for block, twin in zip(var.blocks, transformer.blocks):
        attention = block.attention
        twin.adaln, twin.proj, twin.mlp[0], twin.mlp[2] = block.adaln, attention.proj, block.fc1, block.fc2
        k_bias = torch.randn_like(attention.q_bias)                         # has no effect on softmax
        twin.qkv.weight.copy_(attention.qkv.weight)
        twin.qkv.bias.copy_(torch.cat([attention.q_bias, k_bias, attention.v_bias]))
    return ours, var, theirs, transformer


def test_the_page_quantizes_as_vqvae_does(page):
    ours, _, theirs, _ = twins(page)
    f = torch.randn(16, 16, 8, 8)
    tokens_BL, f_hats = theirs.quantize(f)
    expected_BL, expected = ours.quantize(f)
    assert (tokens_BL == expected_BL).all() and (f_hats[0] == 0).all()
    torch.testing.assert_close(f_hats[1:], torch.stack(expected), atol=1e-5, rtol=0)


def train_with(page: dict, ours: VQVAE, theirs):
    """Lets the page's losses use its quantizer with the project's encoder and decoder."""
    page['tokenizer'] = SimpleNamespace(encoder=ours.features, quantize=theirs.quantize,
                                        decoder=ours.decode_f_hat, codebook=ours.codebook)
    page['used_V'] = torch.zeros(256, dtype=torch.bool)
    return torch.rand(16, 3, 32, 32) * 2 - 1


def test_the_page_trains_the_tokenizer_on_the_same_loss_with_the_same_gradients(page):
    ours, _, theirs, _ = twins(page)
    images = train_with(page, ours, theirs)
    weights = [*ours.encoder.parameters(), *ours.decoder.parameters(), ours.codebook.weight]
    reconstructions, vq_loss, tokens_BL = ours(images)
    expected = torch.nn.functional.mse_loss(reconstructions, images) + vq_loss
    loss = page['tokenizer_loss'](images, None, step=1)
    torch.testing.assert_close(loss, expected)
    assert page['used_V'].nonzero().flatten().tolist() == tokens_BL.unique().tolist()
    found = torch.autograd.grad(loss, [*weights, *theirs.phis.parameters()])
    gradients = torch.autograd.grad(expected, [*weights, *ours.phis.parameters()])
    for ours_now, theirs_now in zip(gradients, found, strict=True):
        torch.testing.assert_close(theirs_now, ours_now, atol=1e-5, rtol=1e-3)


def test_the_page_replaces_unused_codes_by_what_was_to_be_quantized(page):
    ours, _, theirs, _ = twins(page)
    images = train_with(page, ours, theirs)
    before, f = ours.codebook.weight.detach().clone(), ours.features(images).detach()
    tokens_BL, f_hats = theirs.quantize(f)
    page['tokenizer_loss'](images, None, step=20)
    is_used = torch.isin(torch.arange(256), tokens_BL)
    after = ours.codebook.weight.detach().clone()
    assert (after[is_used] == before[is_used]).all() and 0 < is_used.sum() < 200 and not page['used_V'].any()
    z_NC = torch.cat([ours.shrink(f - f_hat, k).flatten(2).mT.flatten(0, 1)
                      for k, f_hat in enumerate(f_hats[:-1])])
    gaps = (after[~is_used][:, None] - z_NC).abs().amax(2).amin(1)
    assert gaps.max() < 1e-5
    page['tokenizer_loss'](images, None, step=600)          # too late
    assert (ours.codebook.weight == after).all()


def test_the_page_hides_a_tenth_of_the_labels_from_the_transformer(page):
    def transformer(labels_B, f_hats):
        seen.append(labels_B)
        return torch.zeros(len(labels_B), 85, 256)
    ours, _, theirs, _ = twins(page)
    images, seen, labels_B = train_with(page, ours, theirs), [], torch.arange(16) % 10
    page['transformer'] = transformer
    for _ in range(200):
        loss = page['transformer_loss'](images, labels_B, step=0)
    is_hidden = torch.stack(seen) != labels_B
    assert loss.item() == pytest.approx(np.log(256)) and (torch.stack(seen)[is_hidden] == 10).all()
    assert abs(is_hidden.float().mean() - 0.1) < 0.027      # five standard deviations


def test_the_pages_transformer_sees_and_predicts_what_var_does(page):
    ours, var, theirs, transformer = twins(page)
    labels_B, seen, masks = torch.arange(11), [], []
    tokens_BL, f_hats = theirs.quantize(torch.randn(11, 16, 8, 8))
    transformer.word_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: masks.append(inputs[2]))
    logits_BLV = transformer(labels_B, f_hats)
    inputs_BLC = ours.teacher_inputs(tokens_BL)
    torch.testing.assert_close(torch.cat(seen, 1), inputs_BLC, atol=1e-5, rtol=0)
    assert len(masks) == 1 and (masks[0] == var.mask_LL).all()
    torch.testing.assert_close(logits_BLV, var(labels_B, inputs_BLC), atol=1e-5, rtol=0)


def test_the_page_samples_with_the_same_guidance_scale_by_scale(page):
    ours, var, theirs, transformer = twins(page)
    labels_B, expected = torch.arange(11), {}
    for cfg in (0.0, 3.0):
        tokens_BL = var.generate(ours, labels_B, cfg, top_k=1, return_tokens=True)[1]
        expected[cfg] = torch.stack(ours.f_hats(tokens_BL))
        found = torch.stack(page['generate'](theirs, transformer, labels_B, cfg, top_p=1e-9))
        torch.testing.assert_close(found, expected[cfg], atol=1e-5, rtol=0)
    assert (expected[0.0] != expected[3.0]).any()


def test_the_page_draws_with_top_p(page):
    """From probabilities 0.5, 0.3, 0.15, 0.05 at every position, of which top-p 0.6 keeps the first two."""
    def transformer(labels_B, f_hats):
        logits_V = torch.full((256,), -50.0)
        logits_V[[7, 3, 200, 9]] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        return logits_V.expand(len(labels_B), 85, 256)

    class Tokenizer:
        def contribution(self, tokens_Bl, k):
            return torch.bincount(tokens_Bl.flatten(), minlength=256)
    drawn_V = page['generate'](Tokenizer(), transformer, torch.zeros(400), cfg=0.0, top_p=0.6)[-1]
    shares_V = drawn_V / (400 * 85)
    assert drawn_V.nonzero().flatten().tolist() == [3, 7]
    assert abs(shares_V[7] - 0.5 / 0.8) < 0.02                              # eight standard deviations


@pytest.mark.slow
def test_the_pages_samples_are_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    names = {}
    for source in code_of_the_page()[:4]:
        exec(source, names)
    labels_B = torch.arange(1000) % 10
    f_hats = names['generate'](names['tokenizer'], names['transformer'], labels_B)
    real_images, real_labels, *_ = judge.read_images('shapes', None)
    referee = judge.load_judge('shapes', real_images, real_labels, tmp_path / 'judge.pt')
    features_ND = referee.features(to_uint8(names['tokenizer'].decoder(f_hats[-1])))
    share = referee.recognised(features_ND, labels_B).mean().item()
    print(f'{share:.1%} of the samples of the page are recognised')
    assert share >= 0.95


# -------------------------------------------------------------------------------- notebooks that break a rule
def raises(notebook):
    output = nbformat.v4.new_output('error', ename='ZeroDivisionError', evalue='', traceback=[])
    notebook.cells[1].outputs.append(output)


def warns(notebook):
    output = nbformat.v4.new_output('stream', name='stderr', text='UserWarning: deprecated')
    notebook.cells[1].outputs.append(output)


def lacks_a_caption(notebook):
    notebook.cells[5].source = notebook.cells[5].source.replace('*Figure 1. ', '')


def draws_twice(notebook):
    notebook.cells[3].outputs *= 2


def asserts_nothing(notebook):
    notebook.cells[4].source = re.sub(r'^assert .*\n?', '', notebook.cells[4].source, flags=re.M)


def was_not_run(notebook):
    notebook.cells[3].execution_count = None


def is_too_long(notebook):
    notebook.cells += [nbformat.v4.new_markdown_cell('more')] * 12


def copies(notebook):
    notebook.cells[1].source += '\n    residual = residual - added[-1].detach()'


BROKEN = {raises: 'ZeroDivisionError', warns: 'UserWarning', lacks_a_caption: 'Figure 1',
          draws_twice: '2 images', asserts_nothing: 'does not end in an assertion',
          was_not_run: 'not run in order', is_too_long: 'cells, at most 30', copies: 'copied: residual'}


@pytest.mark.parametrize('broken', BROKEN, ids=lambda broken: broken.__name__)
def test_a_notebook_that_breaks_a_rule_is_told_so(broken):
    notebook = copy.deepcopy(nbformat.read(WALKTHROUGHS[0], as_version=4))
    broken(notebook)
    assert BROKEN[broken] in '\n'.join(run.problems(notebook))


@pytest.mark.slow
def test_the_walkthroughs_start_in_the_root_of_the_repository_as_well():
    for path in [PAGE] + WALKTHROUGHS:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [next(cell for cell in notebook.cells if cell.cell_type == 'code')]
        resources = dict(metadata=dict(path=str(HERE.parent)))
        NotebookClient(notebook, resources=resources).execute()                 # raises if it fails


@pytest.mark.slow
def test_a_notebook_that_fails_is_not_saved_and_fails_the_run(tmp_path, capsys):
    path = tmp_path / 'fails.ipynb'
    cell = nbformat.v4.new_code_cell('import warnings\nwarnings.warn("deprecated")\nassert 1 == 2')
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    before = path.read_bytes()
    with pytest.raises(run.UserError):
        run.main([str(path), '--save'])
    said = capsys.readouterr().out
    assert 'deprecated' in said and 'AssertionError' in said and path.read_bytes() == before
    with pytest.raises(run.UserError, match='no.ipynb: not a notebook'):
        run.main([str(tmp_path / 'no.ipynb')])


@pytest.mark.skipif(not CIFAR10.exists(), reason='needs CIFAR-10 in ../shared')
def test_the_pictures_of_the_walkthroughs_are_the_first_test_pictures():
    from aids import real_images, sample
    images, labels = real_images()
    sheet = np.asarray(Image.open(CIFAR10 / 'test_batch.webp').convert('RGB'))[:32, :32 * 32]
    found = sample.to_uint8(images).permute(0, 2, 3, 1).numpy()
    assert (found == np.stack(np.split(sheet, 32, axis=1))).all()
    assert labels.tolist() == list((CIFAR10 / 'test_batch.labels').read_bytes()[:32])


def test_the_index_of_questions_leads_to_sections_that_exist():
    page = (HERE / 'README.md').read_text()
    index = page[page.index('| question | notebook |'):page.index('### Questions for')]
    rows = re.findall(r'^\| .*\? \| \[(0\d)\]\((\S+\.ipynb)\), (.*) \|$', index, flags=re.M)
    assert len(rows) == index.count('.ipynb') >= 7
    for number, name, places in rows:
        text = '\n'.join(cell.source for cell in nbformat.read(HERE / name, as_version=4).cells)
        assert name.startswith(number) and ('introduction' in places or 'section' in places)
        assert all(f'\n## {section}. ' in text for section in re.findall(r'\d+', places))
