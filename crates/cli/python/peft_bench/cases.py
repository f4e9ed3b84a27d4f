"""The cases, each a small network under PEFT. All numbers are f32 and drawn from fixed seeds."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

SEED = 1


class Projection(nn.Module):
    """One linear layer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.proj(x)


class Mlp(nn.Module):
    """Up, GELU with tanh, down."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(layer_norm(x)), causal."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        rows, tokens, width = x.shape
        h = self.norm(x)

        def split(y):
            return y.view(rows, tokens, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out_proj(y.transpose(1, 2).reshape(rows, tokens, width))


class Case:
    """A network with its data, and what one iteration of it is."""

    def __init__(self, model, data, target=None):
        self.model, self.data, self.target = model, data, target
        self.iterate = None

    def outputs(self, run):
        """One iteration is a forward pass without gradients."""
        run_once = torch.no_grad()(run)
        self.iterate = run_once
        self.loss = lambda: F.mse_loss(run_once(), self.target).item()
        return self

    def trains(self, loss_of, lr):
        """One iteration is a training step: forward, loss, backward, AdamW, zero gradients."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        # The fused step is what transformers' Trainer takes, and the quickest on a CPU.
        optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)

        def step():
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        self.iterate = step
        self.loss = lambda: step().item()
        return self

    def write(self, file):
        """Writes all weights and the data; adapters become `layer.lora_A.adapter`."""
        tensors = {"x": self.data}
        if self.target is not None:
            tensors["target"] = self.target
        for name, tensor in self.model.state_dict().items():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if ".lora_" in name:
                name = name.removesuffix(".weight")
            if name != "lm_head.weight":  # the embedding's own
                tensors[name] = tensor
        save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, file)


def adapted(model, case, targets):
    """The model with a LoRA adapter whose B is random, so that every product counts."""
    config = LoraConfig(
        r=case.get("r", 8),
        lora_alpha=case.get("alpha", 16),
        target_modules=targets,
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    return get_peft_model(model, config)


def maybe_compiled(function, compiled):
    return torch.compile(function, dynamic=False) if compiled else function


def training(model, case, compiled, shape):
    """A step with mean squared error."""
    model.train()
    x, target = torch.randn(shape), torch.randn(shape)
    loss_of = maybe_compiled(lambda: F.mse_loss(model(x), target), compiled)
    return Case(model, x, target).trains(loss_of, case.get("lr", 1e-4))


def linear(case, compiled):
    model = adapted(Projection(768, 768), case, ["proj"])
    shape = (case["batch"], 768)
    if case["case"] == "linear-step":
        return training(model, case, compiled, shape)
    x, target = torch.randn(shape), torch.randn(shape)
    return Case(model, x, target).outputs(maybe_compiled(lambda: model(x), compiled))


def mlp(case, compiled):
    model = adapted(Mlp(768, 3072), case, ["up", "down"])
    return training(model, case, compiled, (case.get("batch", 256), 768))


def attention(case, compiled):
    model = adapted(Block(768, 12), case, ["q_proj", "v_proj"])
    shape = (case.get("batch", 2), case.get("tokens", 128), 768)
    return training(model, case, compiled, shape)


def merged(case, compiled):
    """Inference through one layer: base alone, adapter merged in, adapter beside it."""
    model = Projection(768, 3072)
    if case["form"] != "base":
        model = adapted(model, case, ["proj"])
    model.eval()
    x, target = torch.randn(256, 768), torch.randn(256, 3072)
    result = Case(model, x, target).outputs(maybe_compiled(lambda: model(x), compiled))
    if case["form"] == "merged":
        # The weights go to the file as they were before the merge.
        write, merge = result.write, model.merge_adapter
        result.write = lambda file: (model.unmerge_adapter(), write(file), merge())
        merge()
    return result


def mixed(case, compiled):
    """A batch in which row i has adapter i modulo their number."""
    model = adapted(Projection(768, 768), case, ["proj"])
    config, number = model.peft_config["default"], case["adapters"]
    for adapter in range(number):
        model.add_adapter(f"a{adapter}", config)
    model.delete_adapter("default")
    model.eval()
    rows, tokens = case.get("rows", 64), case.get("tokens", 16)
    names = [f"a{row % number}" for row in range(rows)]
    x, target = torch.randn(rows, tokens, 768), torch.randn(rows, tokens, 768)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    run = maybe_compiled(lambda: layer(x, adapter_names=names), compiled)
    return Case(model, x, target).outputs(run)


def llama(case, compiled):
    """SmolLM2-135M's shape with random weights: a step of next-token training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=case.get("layers", 30),
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = adapted(LlamaForCausalLM(config), case, ["q_proj", "v_proj"])
    model.train()
    tokens = torch.randint(0, 49152, (case.get("batch", 1), case.get("tokens", 256)))
    # transformers shifts the labels by one itself.
    loss_of = maybe_compiled(lambda: model(input_ids=tokens, labels=tokens).loss, compiled)
    return Case(model, tokens).trains(loss_of, case.get("lr", 1e-4))


BUILDERS = {
    "linear-forward": linear,
    "linear-step": linear,
    "mlp-step": mlp,
    "attention-step": attention,
    "merged": merged,
    "mixed": mixed,
    "llama-step": llama,
}


def build(case, compiled):
    """The network of a request's case."""
    if compiled:
        # Every case is one more compilation of the few functions above.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 1024
    torch.manual_seed(SEED)
    return BUILDERS[case["case"]](case, compiled)
