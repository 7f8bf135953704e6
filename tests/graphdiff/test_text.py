"""The text of a diff: real models' blocks as goldens, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfx
from normfx.errors import OptionError
from tests.models import Block, head, roughened

transformers = pytest.importorskip("transformers")


def diff_of(model, *args, options=None, dynamic=None, **kwargs):
    model = model.eval()
    with torch.no_grad():
        return normfx.diff(model, dynamic=dynamic, options={"strict": True, **(options or {})})(
            *args, **kwargs
        )


def gpt2(layers):
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=16,
        n_head=2,
        vocab_size=50,
        n_positions=32,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return roughened(transformers.GPT2Model(config))


IDS = torch.arange(8)[None]


def test_gpt2_block():
    text = diff_of(gpt2(2), IDS).text(after="hoist", context=0)
    assert_expected_inline(
        text,
        """\
graph 0: capture -> hoist, 154 -> 162 nodes, 5 norms, 5 rewritten
# 17 more inputs, made from parameters when these change
# 8 nodes gone that compute what others do
@@ -32,3 +32,1 @@ wpe
-v5: float32[1, 8, 16] = embedding(.weight, v4)  # wpe
-v6: float32[1, 8, 16] = to(v5, dtype=float32)
-v7: float32[1, 8, 16] = add(v1, v6)
+v7: float32[1, 8, 16] = add(v1, hoisted.0)
@@ -59,0 +57,2 @@ drop
+n0: float32[1, 8, 1] = mean(v41, [2], keepdim=True)  # drop
+n1: float32[1, 8, 16] = sub(v41, n0)  # drop
@@ -59,1 +59,1 @@ h.0.ln_1 (x2: h.0 to h.1, differing only in weights)
# h.0.ln_1 (LayerNorm): recentre, fold-affine-into-linear
-v42: float32[1, 8, 16] = layer_norm(v41, [16], weight=.weight, bias=.bias)  # h.0.ln_1
+v42: float32[1, 8, 16] = norm(n1, RMSNorm over [2], eps 1e-05)  # h.0.ln_1
@@ -61,1 +61,1 @@ h.0.attn.c_attn (x2: h.0 to h.1, differing only in weights)
-v44: float32[8, 48] = addmm(.bias, v43, .weight)  # h.0.attn.c_attn
+v44: float32[8, 48] = addmm(.bias', v43, .weight')  # h.0.attn.c_attn
@@ -78,1 +78,1 @@ h.0.attn.c_proj (x2: h.0 to h.1, differing only in weights)
-v61: float32[8, 16] = addmm(.bias, v60, .weight)  # h.0.attn.c_proj
+v61: float32[8, 16] = addmm(.bias', v60, .weight')  # h.0.attn.c_proj
@@ -81,2 +81,2 @@ h.0 (x2: h.0 to h.1, differing only in weights)
# h.0.ln_2 (LayerNorm): recentre, fold-affine-into-linear
-v64: float32[1, 8, 16] = add(v63, v41)  # h.0
-v65: float32[1, 8, 16] = layer_norm(v64, [16], weight=.weight, bias=.bias)  # h.0.ln_2
+v64: float32[1, 8, 16] = add(v63, n1)  # h.0
+v65: float32[1, 8, 16] = norm(v64, RMSNorm over [2], eps 1e-05)  # h.0.ln_2
@@ -84,1 +84,1 @@ h.0.mlp.c_fc (x2: h.0 to h.1, differing only in weights)
-v67: float32[8, 64] = addmm(.bias, v66, .weight)  # h.0.mlp.c_fc
+v67: float32[8, 64] = addmm(.bias', v66, .weight')  # h.0.mlp.c_fc
@@ -95,1 +95,1 @@ h.0.mlp.c_proj (x2: h.0 to h.1, differing only in weights)
-v78: float32[8, 16] = addmm(.bias, v77, .weight)  # h.0.mlp.c_proj
+v78: float32[8, 16] = addmm(.bias', v77, .weight')  # h.0.mlp.c_proj
@@ -139,3 +139,2 @@ ln_f
# ln_f (LayerNorm): recentre; refused fold-affine-into-linear (extra-user)
-v122: float32[1, 8, 16] = layer_norm(v121, [16], weight=.weight, bias=.bias)  # ln_f
-v123: float32[1, 8, 16] = view(v122, [-1, 8, 16])
-return v123
+n2: float32[1, 8, 16] = norm(v121, weight=.weight, bias=.bias, RMSNorm over [2], eps 1e-05)  # ln_f
+return n2
""",
    )


def test_llama_block():
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    text = diff_of(transformers.LlamaModel(config), IDS).text(after="hoist", context=0)
    assert_expected_inline(
        text,
        """\
graph 0: capture -> hoist, 185 -> 174 nodes, 5 norms, 4 rewritten
# 10 more inputs, made from parameters when these change
# 10 nodes gone that compute what others do
@@ -59,9 +59,5 @@ layers.0 (x2: layers.0 to layers.1, differing only in weights)
# layers.0.input_layernorm (RMSNorm): fold-affine-into-linear, defer-scale
-v49: float32[1, 8, 16] = pow(v48, 2)  # layers.0.input_layernorm
-  ... 5 nodes more
-v55: float32[1, 8, 16] = mul(.weight, v54)  # layers.0.input_layernorm
-v56: float32[1, 8, 16] = linear(v55, .weight)  # layers.0.self_attn.q_proj
-v57: float32[1, 8, 2, 8] = view(v56, [1, 8, -1, 8])  # layers.0.self_attn
+n0: float32[1, 8, 1] = row_scale(v0, RMSNorm over [2], eps 1e-06)  # layers.0.input_layernorm
+v56: float32[1, 8, 16] = linear(v0, .weight')  # layers.0.self_attn.q_proj
+n1: float32[1, 8, 16] = mul(v56, n0)  # layers.0.self_attn.q_proj
+n2: float32[1, 8, 16] = to(n1, float32)  # layers.0.self_attn.q_proj
+v57: float32[1, 8, 2, 8] = view(n2, [1, 8, -1, 8])  # layers.0.self_attn
@@ -69,2 +65,4 @@ layers.0.self_attn (x2: layers.0 to layers.1, differing only in weights)
-v59: float32[1, 8, 16] = linear(v55, .weight)  # layers.0.self_attn.k_proj
-v60: float32[1, 8, 2, 8] = view(v59, [1, 8, -1, 8])  # layers.0.self_attn
+v59: float32[1, 8, 16] = linear(v0, .weight')  # layers.0.self_attn.k_proj
+n3: float32[1, 8, 16] = mul(v59, n0)  # layers.0.self_attn.k_proj
+n4: float32[1, 8, 16] = to(n3, float32)  # layers.0.self_attn.k_proj
+v60: float32[1, 8, 2, 8] = view(n4, [1, 8, -1, 8])  # layers.0.self_attn
@@ -72,2 +70,4 @@ layers.0.self_attn (x2: layers.0 to layers.1, differing only in weights)
-v62: float32[1, 8, 16] = linear(v55, .weight)  # layers.0.self_attn.v_proj
-v63: float32[1, 8, 2, 8] = view(v62, [1, 8, -1, 8])  # layers.0.self_attn
+v62: float32[1, 8, 16] = linear(v0, .weight')  # layers.0.self_attn.v_proj
+n5: float32[1, 8, 16] = mul(v62, n0)  # layers.0.self_attn.v_proj
+n6: float32[1, 8, 16] = to(n5, float32)  # layers.0.self_attn.v_proj
+v63: float32[1, 8, 2, 8] = view(n6, [1, 8, -1, 8])  # layers.0.self_attn
@@ -96,11 +96,9 @@ layers.0 (x2: layers.0 to layers.1, differing only in weights)
# layers.0.post_attention_layernorm (RMSNorm): fold-affine-into-linear, defer-scale
-v88: float32[1, 8, 16] = pow(v87, 2)  # layers.0.post_attention_layernorm
-  ... 5 nodes more
-v94: float32[1, 8, 16] = mul(.weight, v93)  # layers.0.post_attention_layernorm
-v95: float32[1, 8, 24] = linear(v94, .weight)  # layers.0.mlp.gate_proj
-v96: float32[1, 8, 24] = silu(v95)  # layers.0.mlp.act_fn
-v97: float32[1, 8, 24] = linear(v94, .weight)  # layers.0.mlp.up_proj
-v98: float32[1, 8, 24] = mul(v96, v97)  # layers.0.mlp
+n7: float32[1, 8, 1] = row_scale(v86, RMSNorm over [2], eps 1e-06)  # layers.0.post_attention_layernorm
+v95: float32[1, 8, 24] = linear(v86, .weight')  # layers.0.mlp.gate_proj
+n8: float32[1, 8, 24] = mul(v95, n7)  # layers.0.mlp.gate_proj
+n9: float32[1, 8, 24] = to(n8, float32)  # layers.0.mlp.gate_proj
+v96: float32[1, 8, 24] = silu(n9)  # layers.0.mlp.act_fn
+v97: float32[1, 8, 24] = linear(v86, .weight')  # layers.0.mlp.up_proj
+n10: float32[1, 8, 24] = mul(v97, n7)  # layers.0.mlp.up_proj
+n11: float32[1, 8, 24] = to(n10, float32)  # layers.0.mlp.up_proj
+v98: float32[1, 8, 24] = mul(v96, n11)  # layers.0.mlp
@@ -160,8 +156,1 @@ norm
# norm (RMSNorm): kept; refused fold-affine-into-linear (extra-user)
-v154: float32[1, 8, 16] = to(v153, float32)  # norm
-  ... 6 nodes more
-v161: float32[1, 8, 16] = mul(.weight, v160)  # norm
+v161: float32[1, 8, 16] = norm(v153, weight=.weight, RMSNorm over [2], eps 1e-06)  # norm
""",
    )


def test_vit_block():
    config = transformers.ViTConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = diff_of(transformers.ViTModel(config), torch.ones(1, 3, 16, 16)).text(
        after="hoist", context=0
    )
    assert_expected_inline(
        text,
        """\
graph 0: capture -> hoist, 99 -> 133 nodes, 5 norms, 5 rewritten
# 28 more inputs, made from parameters when these change
@@ -42,1 +42,1 @@ embeddings.patch_embeddings.projection
-v0: float32[1, 16, 2, 2] = conv2d(args.0, .weight, bias=.bias, stride=[8, 8])  # embeddings.patch_embeddings.projection
+v0: float32[1, 16, 2, 2] = conv2d(args.0, .weight', bias=.bias', stride=[8, 8])  # embeddings.patch_embeddings.projection
@@ -45,1 +45,1 @@ embeddings
-v3: float32[1, 1, 16] = expand(.cls_token, [1, -1, -1])  # embeddings
+v3: float32[1, 1, 16] = expand(.cls_token', [1, -1, -1])  # embeddings
@@ -47,1 +47,1 @@ embeddings
-v5: float32[1, 5, 16] = add(v4, .position_embeddings)  # embeddings
+v5: float32[1, 5, 16] = add(v4, .position_embeddings')  # embeddings
@@ -49,2 +49,2 @@ layers.0 (x2: layers.0 to layers.1, differing only in weights)
# layers.0.layernorm_before (LayerNorm): recentre, fold-affine-into-linear; refused defer-scale (not-worth-it)
-v7: float32[1, 5, 16] = layer_norm(v6, [16], weight=.weight, bias=.bias, eps=1e-12)  # layers.0.layernorm_before
-v8: float32[1, 5, 16] = linear(v7, .weight, bias=.bias)  # layers.0.attention.q_proj
+v7: float32[1, 5, 16] = norm(v6, RMSNorm over [2], eps 1e-12)  # layers.0.layernorm_before
+v8: float32[1, 5, 16] = linear(v7, .weight', bias=.bias')  # layers.0.attention.q_proj
@@ -53,1 +53,1 @@ layers.0.attention.k_proj (x2: layers.0 to layers.1, differing only in weights)
-v11: float32[1, 5, 16] = linear(v7, .weight, bias=.bias)  # layers.0.attention.k_proj
+v11: float32[1, 5, 16] = linear(v7, .weight', bias=.bias')  # layers.0.attention.k_proj
@@ -56,1 +56,1 @@ layers.0.attention.v_proj (x2: layers.0 to layers.1, differing only in weights)
-v14: float32[1, 5, 16] = linear(v7, .weight, bias=.bias)  # layers.0.attention.v_proj
+v14: float32[1, 5, 16] = linear(v7, .weight', bias=.bias')  # layers.0.attention.v_proj
@@ -63,1 +63,1 @@ layers.0.attention.o_proj (x2: layers.0 to layers.1, differing only in weights)
-v21: float32[1, 5, 16] = linear(v20, .weight, bias=.bias)  # layers.0.attention.o_proj
+v21: float32[1, 5, 16] = linear(v20, .weight', bias=.bias')  # layers.0.attention.o_proj
@@ -66,4 +66,7 @@ layers.0 (x2: layers.0 to layers.1, differing only in weights)
# layers.0.layernorm_after (LayerNorm): recentre, fold-affine-into-linear, defer-scale
-v24: float32[1, 5, 16] = layer_norm(v23, [16], weight=.weight, bias=.bias, eps=1e-12)  # layers.0.layernorm_after
-v25: float32[1, 5, 24] = linear(v24, .weight, bias=.bias)  # layers.0.mlp.fc1
-v26: float32[1, 5, 24] = gelu(v25)  # layers.0.mlp.activation_fn
-v27: float32[1, 5, 16] = linear(v26, .weight, bias=.bias)  # layers.0.mlp.fc2
+n0: float32[1, 5, 1] = row_scale(v23, RMSNorm over [2], eps 1e-12)  # layers.0.layernorm_after
+v25: float32[1, 5, 24] = linear(v23, .weight')  # layers.0.mlp.fc1
+n1: float32[1, 5, 24] = mul(v25, n0)  # layers.0.mlp.fc1
+n2: float32[1, 5, 24] = add(n1, .bias')  # layers.0.mlp.fc1
+n3: float32[1, 5, 24] = to(n2, float32)  # layers.0.mlp.fc1
+v26: float32[1, 5, 24] = gelu(n3)  # layers.0.mlp.activation_fn
+v27: float32[1, 5, 16] = linear(v26, .weight', bias=.bias')  # layers.0.mlp.fc2
@@ -95,1 +101,1 @@ layernorm
# layernorm (LayerNorm): recentre; refused fold-affine-into-linear (extra-user)
-v53: float32[1, 5, 16] = layer_norm(v52, [16], weight=.weight, bias=.bias, eps=1e-12)  # layernorm
+v53: float32[1, 5, 16] = norm(v52, weight=.weight, bias=.bias, RMSNorm over [2], eps 1e-12)  # layernorm
""",
    )


def test_resnet_block():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic"
    )
    text = diff_of(transformers.ResNetModel(config), torch.ones(1, 3, 16, 16)).text(context=0)
    assert_expected_inline(
        text,
        """\
graph 0: capture -> lower, 36 -> 40 nodes, 4 norms, 4 rewritten
# 8 more inputs, made from parameters when these change
@@ -22,3 +22,2 @@ embedder.embedder
# embedder.embedder.normalization (BatchNorm): fold-statistics-into-previous
-v0: float32[1, 4, 8, 8] = conv2d(pixel_values, .weight, stride=[2, 2], padding=[3, 3])  # embedder.embedder.convolution
-v1: float32[1, 4, 8, 8] = batch_norm(v0, .weight, .bias, running_mean=.running_mean, running_var=.running_var, training=False, momentum=0.1, eps=1e-05)  # embedder.embedder.normalization
-v2: float32[1, 4, 8, 8] = relu(v1)  # embedder.embedder.activation
+v0: float32[1, 4, 8, 8] = conv2d(pixel_values, .weight', bias=.bias', stride=[2, 2], padding=[3, 3])  # embedder.embedder.convolution
+v2: float32[1, 4, 8, 8] = relu(v0)  # embedder.embedder.activation
@@ -26,8 +25,5 @@ encoder.stages.0.layers.0
# encoder.stages.0.layers.0.layer.0.normalization (BatchNorm): fold-statistics-into-previous
# encoder.stages.0.layers.0.layer.1.normalization (BatchNorm): fold-statistics-into-previous
# encoder.stages.0.layers.0.shortcut.normalization (BatchNorm): fold-statistics-into-previous
-v4: float32[1, 8, 4, 4] = conv2d(v3, .weight, stride=[1, 1], padding=[1, 1])  # encoder.stages.0.layers.0.layer.0.convolution
-v5: float32[1, 8, 4, 4] = batch_norm(v4, .weight, .bias, running_mean=.running_mean, running_var=.running_var, training=False, momentum=0.1, eps=1e-05)  # encoder.stages.0.layers.0.layer.0.normalization
-v6: float32[1, 8, 4, 4] = relu(v5)  # encoder.stages.0.layers.0.layer.0.activation
-v7: float32[1, 8, 4, 4] = conv2d(v6, .weight, stride=[1, 1], padding=[1, 1])  # encoder.stages.0.layers.0.layer.1.convolution
-v8: float32[1, 8, 4, 4] = batch_norm(v7, .weight, .bias, running_mean=.running_mean, running_var=.running_var, training=False, momentum=0.1, eps=1e-05)  # encoder.stages.0.layers.0.layer.1.normalization
-v9: float32[1, 8, 4, 4] = conv2d(v3, .weight)  # encoder.stages.0.layers.0.shortcut.convolution
-v10: float32[1, 8, 4, 4] = batch_norm(v9, .weight, .bias, running_mean=.running_mean, running_var=.running_var, training=False, momentum=0.1, eps=1e-05)  # encoder.stages.0.layers.0.shortcut.normalization
-v11: float32[1, 8, 4, 4] = add(v8, v10)  # encoder.stages.0.layers.0
+v4: float32[1, 8, 4, 4] = conv2d(v3, .weight', bias=.bias', stride=[1, 1], padding=[1, 1])  # encoder.stages.0.layers.0.layer.0.convolution
+v6: float32[1, 8, 4, 4] = relu(v4)  # encoder.stages.0.layers.0.layer.0.activation
+v7: float32[1, 8, 4, 4] = conv2d(v6, .weight', bias=.bias', stride=[1, 1], padding=[1, 1])  # encoder.stages.0.layers.0.layer.1.convolution
+v9: float32[1, 8, 4, 4] = conv2d(v3, .weight', bias=.bias')  # encoder.stages.0.layers.0.shortcut.convolution
+v11: float32[1, 8, 4, 4] = add(v7, v9)  # encoder.stages.0.layers.0
""",
    )


def test_minilm_block():
    config = transformers.BertConfig(  # post-norm, as MiniLM
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    text = diff_of(transformers.BertModel(config), IDS).text(after="recognise", context=0)
    assert_expected_inline(
        text,
        """\
graph 0: capture -> recognise, 103 -> 102 nodes, 5 norms, 1 rewritten
@@ -52,3 +52,2 @@
# embeddings.LayerNorm (LayerNorm): recentre; refused fold-affine-into-linear (reader-not-linear)
-v9: float32[1, 8, 16] = layer_norm(v8, [16], weight=.weight, bias=.bias, eps=1e-12)  # embeddings.LayerNorm
-v10: float32[1, 8, 16] = dropout(v9, 0.1, False)  # embeddings.dropout
-v11: float32[1, 8, 16] = linear(v10, .weight, bias=.bias)  # encoder.layer.0.attention.self.query
+n0: float32[1, 8, 16] = norm(v8, weight=.weight, bias=.bias, LayerNorm over [2], eps 1e-12)  # embeddings.LayerNorm
+v11: float32[1, 8, 16] = linear(n0, .weight, bias=.bias)  # encoder.layer.0.attention.self.query
@@ -57,1 +56,1 @@ encoder.layer.0.attention.self.key
-v14: float32[1, 8, 16] = linear(v10, .weight, bias=.bias)  # encoder.layer.0.attention.self.key
+v14: float32[1, 8, 16] = linear(n0, .weight, bias=.bias)  # encoder.layer.0.attention.self.key
@@ -60,1 +59,1 @@ encoder.layer.0.attention.self.value
-v17: float32[1, 8, 16] = linear(v10, .weight, bias=.bias)  # encoder.layer.0.attention.self.value
+v17: float32[1, 8, 16] = linear(n0, .weight, bias=.bias)  # encoder.layer.0.attention.self.value
@@ -69,2 +68,2 @@ encoder.layer.0.attention.output
# encoder.layer.0.attention.output.LayerNorm (LayerNorm): kept; refused recentre (post-norm-input), fold-affine-into-linear (reader-not-linear)
-v26: float32[1, 8, 16] = add(v25, v10)  # encoder.layer.0.attention.output
-v27: float32[1, 8, 16] = layer_norm(v26, [16], weight=.weight, bias=.bias, eps=1e-12)  # encoder.layer.0.attention.output.LayerNorm
+v26: float32[1, 8, 16] = add(v25, n0)  # encoder.layer.0.attention.output
+v27: float32[1, 8, 16] = norm(v26, weight=.weight, bias=.bias, LayerNorm over [2], eps 1e-12)  # encoder.layer.0.attention.output.LayerNorm
@@ -76,1 +75,1 @@ encoder.layer.0.output.LayerNorm
# encoder.layer.0.output.LayerNorm (LayerNorm): kept; refused recentre (post-norm-input), fold-affine-into-linear (reader-not-linear)
-v33: float32[1, 8, 16] = layer_norm(v32, [16], weight=.weight, bias=.bias, eps=1e-12)  # encoder.layer.0.output.LayerNorm
+v33: float32[1, 8, 16] = norm(v32, weight=.weight, bias=.bias, LayerNorm over [2], eps 1e-12)  # encoder.layer.0.output.LayerNorm
@@ -93,1 +92,1 @@ encoder.layer.1.attention.output.LayerNorm
# encoder.layer.1.attention.output.LayerNorm (LayerNorm): kept; refused recentre (post-norm-input), fold-affine-into-linear (reader-not-linear)
-v50: float32[1, 8, 16] = layer_norm(v49, [16], weight=.weight, bias=.bias, eps=1e-12)  # encoder.layer.1.attention.output.LayerNorm
+v50: float32[1, 8, 16] = norm(v49, weight=.weight, bias=.bias, LayerNorm over [2], eps 1e-12)  # encoder.layer.1.attention.output.LayerNorm
@@ -99,1 +98,1 @@ encoder.layer.1.output.LayerNorm
# encoder.layer.1.output.LayerNorm (LayerNorm): kept; refused recentre (post-norm-input), fold-affine-into-linear (extra-user)
-v56: float32[1, 8, 16] = layer_norm(v55, [16], weight=.weight, bias=.bias, eps=1e-12)  # encoder.layer.1.output.LayerNorm
+v56: float32[1, 8, 16] = norm(v55, weight=.weight, bias=.bias, LayerNorm over [2], eps 1e-12)  # encoder.layer.1.output.LayerNorm
""",
    )


def test_the_graph_of_a_stage():
    text = diff_of(head(), torch.ones(2, 8)).graph_text("recognise")
    assert_expected_inline(
        text,
        """\
0.weight: float32[8] = parameter
0.bias: float32[8] = parameter
args.0: float32[2, 8] = input
1.weight: float32[4, 8] = parameter
1.bias: float32[4] = parameter
v0: float32[2, 8] = norm(args.0, weight=.weight, bias=.bias, LayerNorm over [1], eps 1e-05)  # 0
v1: float32[2, 4] = linear(v0, .weight, bias=.bias)  # 1
return v1
""",
    )


def test_symbolic_shapes_and_casts():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x.float()).to(torch.bfloat16)

    text = diff_of(Cast(), torch.ones(3, 8).bfloat16(), dynamic=True).graph_text("recognise")
    assert_expected_inline(
        text,
        """\
x.size.0: number s0 = input
x: bfloat16[s0, 8] = input
norm.weight: float32[8] = parameter
norm.bias: float32[8] = parameter
norm.eps: float64[] = parameter
v0: float32[s0, 8] = to(x, float32)  # cast bfloat16 -> float32
v1: number 0.0000100000000000000 = item(.eps)  # norm
v2: bfloat16[s0, 8] = norm(v0, weight=.weight, bias=.bias, LayerNorm over [1], eps 1e-05, statistics in float32)  # norm
return v2
""",
    )


def test_the_text_is_the_same_on_every_run():
    first, second = (diff_of(gpt2(2), IDS) for _ in range(2))
    for settings in ({}, {"expand": True}, {"context": 1, "before": "fold"}):
        assert first.text(**settings) == second.text(**settings)


def test_no_address_device_or_stride_is_printed():
    text = "".join(
        diff_of(gpt2(1), IDS).graph_text(stage) for stage in ("capture", "fold", "lower")
    )
    assert "0x" not in text
    assert "cpu" not in text
    assert "stride" not in text


def stack(layers):
    return nn.Sequential(*[roughened(Block()) for _ in range(layers)], *head())


def test_a_deep_model_is_short_and_expands():
    deep, deeper = (diff_of(stack(n), torch.ones(2, 8)) for n in (8, 32))
    assert len(deep.text().splitlines()) == len(deeper.text().splitlines()) < 60
    assert "x31: 1 to 31, differing only in weights" in deeper.text()
    assert len(deeper.text(expand=True).splitlines()) > 300
    assert "differing only" not in deeper.text(expand=True)


def test_a_layer_that_differs_is_not_collapsed():
    model = stack(6)
    model[3].norm.eps = 1e-3
    text = diff_of(model, torch.ones(2, 8)).text(after="recognise")
    assert "(x3: 0 to 2, differing only in weights)" in text
    assert "(x2: 4 to 5, differing only in weights)" in text
    assert "eps=0.001" in text


def test_every_site_is_named_with_its_verdict():
    diff = diff_of(stack(4), torch.ones(2, 8), options={"rules": []})
    assert_expected_inline(
        diff.text(context=0),
        """\
graph 0: capture -> lower, 52 -> 132 nodes, 5 norms, 0 rewritten
@@ -30,1 +30,17 @@ 0.norm (x4: 0 to 3, differing only in weights)
# 0.norm (LayerNorm): kept; refused recentre (rule-off), fold-affine-into-linear (rule-off)
-v0: float32[2, 8] = layer_norm(args.0, [8], weight=.weight, bias=.bias)  # 0.norm
+n0: float32[2, 8] = to(args.0, float32)  # 0.norm
+  ... 15 nodes more
+v0: float32[2, 8] = to(n15, float32)  # 0.norm
@@ -50,1 +114,17 @@ 4
# 4 (LayerNorm): kept; refused recentre (rule-off), fold-affine-into-linear (rule-off)
-v20: float32[2, 8] = layer_norm(v19, [8], weight=.weight, bias=.bias)  # 4
+n64: float32[2, 8] = to(v19, float32)  # 4
+  ... 15 nodes more
+v20: float32[2, 8] = to(n79, float32)  # 4
""",
    )


def test_training_graphs_and_bodies_of_checkpoints():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    x = torch.ones(2, 8, requires_grad=True)
    diff = normfx.diff(Checkpointed().train(), options={"strict": True})(x)
    assert [graph.name for graph in diff.graphs] == [
        "graph 0",
        *(f"graph 0, body.{i}" for i in range(3)),
    ]
    assert len(diff.sites) == 3
    assert_expected_inline(
        diff.text(after="recognise", context=0),
        """\
graph 0: capture -> recognise, 29 -> 29 nodes, 3 norms, 0 rewritten

graph 0, body.0 (x3, differing only in weights): capture -> recognise, 13 -> 13 nodes
@@ -8,1 +8,1 @@ blocks.*.norm
# blocks.*.norm (LayerNorm): kept; refused recentre (needs-grad), fold-affine-into-linear (needs-grad)
-v0: float32[2, 8] = layer_norm(input.0, [8], weight=input.1, bias=input.2)  # blocks.*.norm
+v0: float32[2, 8] = norm(input.0, weight=input.1, bias=input.2, LayerNorm over [1], eps 1e-05)  # blocks.*.norm
""",
    )


def test_several_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = head(8, 8), head(8, 4)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    diff = diff_of(Broken(), torch.ones(2, 8))
    assert [graph.name for graph in diff.graphs] == ["graph 0", "graph 1"]
    assert diff.text().count(": capture -> lower") == 2
    assert "second.0.weight" in diff.graph_text("capture", "graph 1")


@pytest.mark.inductor
def test_it_does_not_depend_on_what_is_compiled_already():
    model, x = stack(2).eval(), torch.ones(2, 8)
    before = diff_of(model, x).text()
    with torch.no_grad():
        torch.compile(model, backend="normfx")(x)
        assert diff_of(model, x).text() == before
        torch._dynamo.reset()  # the next compilation hits the caches of Inductor
        with (
            torch._inductor.config.patch(fx_graph_cache=True),
            torch._functorch.config.patch(enable_autograd_cache=True),
        ):
            for _ in range(2):
                torch.compile(model, backend="normfx")(x)
                assert diff_of(model, x).text() == before
                torch._dynamo.reset()


def test_stages():
    diff = diff_of(head(), torch.ones(2, 8))
    stages = {summary.stage: summary for summary in diff.stages}
    assert list(stages) == ["capture", "recognise", "rewrite", "fold", "hoist", "lower"]
    assert stages["capture"].delta == {"layer_norm": 1, "linear": 1}
    assert stages["recognise"].delta == {"layer_norm": -1, "norm": 1}
    assert stages["rewrite"].delta == {}
    assert all(summary.seconds > 0 for summary in diff.stages)
    assert stages["capture"].nodes == 8


def test_the_reports_of_the_process_stay_as_they_are():
    diff_of(head(), torch.ones(2, 8))
    assert normfx.report().graphs == ()


def test_a_graph_that_is_left_to_inductor_says_so(monkeypatch):
    import normfx.pipeline

    def fails(*args, **kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(normfx.pipeline, "fold", fails)
    with torch.no_grad():
        diff = normfx.diff(head())(torch.ones(2, 8))
    assert diff.text() == (
        "graph 0\n# left to Inductor: normfx stage 'fold' failed: RuntimeError: on purpose\n"
    )
    assert [summary.stage for summary in diff.stages] == ["capture", "recognise", "rewrite"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"before": "captur"}, "there is no stage 'captur', only capture, .* mean 'capture'"),
        ({"after": "nothing"}, "there is no stage 'nothing', only capture, recognise, .*lower$"),
        ({"context": -1}, "context is -1; it must not be negative"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    diff = diff_of(head(), torch.ones(2, 8))
    with pytest.raises(OptionError, match=message):
        diff.text(**settings)
