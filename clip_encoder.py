"""CLIP: turns a prompt into vectors that a network can draw from.

    "a starry night" --tokenizer--> ids (B, L) --CLIPTextEncoder--> context (B, L, D)

Why CLIP? A text encoder trained on text alone knows which words go together. CLIP (Radford et al.
2021) was trained on pictures with their captions. A text tower and a vision tower map into one
shared space. Among all captions of a batch, a picture must be closest to its own, and a caption to
its own picture. So the text tower knows what words look like. Stable Diffusion keeps the text
tower, frozen, and leaves the vision tower behind.

Why all L hidden states, and not the one pooled vector that CLIP compares? The pooled vector is a
summary, good enough to pick a picture out of a crowd. To draw the picture, each part of it needs
its own words: the sky attends to "starry", the ground to "dunes". The L vectors keep the words
apart. Attention is causal, so vector i has read tokens 0 to i.

Papers: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision"; Sennrich et al. 2016 (byte-pair encoding). Parameter names are those of transformers'
CLIPModel.

Letters: B batch; L tokens of a text, 77 in Stable Diffusion because OpenAI's CLIP was trained with
as many; D width, 768; V vocabulary; P width of the shared space; nh attention heads of size hs; S
side of a picture, p side of a patch. Before this file: vae.py. Read next: ddpm.py.
"""
import json
import math
import re
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

# ---- Tokenizer: text to integers -----------------------------------------------------------------

def train_tokenizer(captions, vocab_size, max_length):
    """Learn a byte-pair encoding from captions (list of str) -> transformers' CLIPTokenizer.

    Start from single bytes. Again and again, give the most frequent pair of neighbours a token of
    its own, until common words are one token each. A rare word still has its bytes, so no word is
    unknown. Ids, in OpenAI's order: 256 bytes, 256 bytes that end a word, the learned pairs, start
    of text, end of text. max_length: the number of tokens L of every tokenized text.
    """
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]

    untrained = CLIPTokenizer(vocab=number(tokens + special), merges=[])
    trained = untrained.train_new_from_iterator(captions, vocab_size, show_progress=False)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]

    # The trainer forgets the bytes that no caption has, and learns more pairs in their place. Build
    # the vocabulary anew, with all bytes.
    merges = merges[:max(vocab_size - len(tokens) - len(special), 0)]
    tokens += [first + second for first, second in merges]
    vocab = number(list(dict.fromkeys(tokens)) + special)      # two pairs may make the same token
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)

def number(tokens):
    """A list of tokens -> {token: its id}."""
    return {token: i for i, token in enumerate(tokens)}

def to_text(text):
    """text with "?" for bytes that are no characters, as a command line or a file name may have."""
    return text.encode("utf-8", "replace").decode("utf-8")

def tokenize(tokenizer, texts):
    """texts (list of str) -> ids (B, L) int64: start, text, end, padding. Longer texts are cut."""
    L = min(tokenizer.model_max_length, 77)                    # without a limit, that is huge
    texts = [to_text(text) for text in texts]
    rows = []
    # To ask the tokenizer to cut and pad would change its settings, which all threads share.
    for row in tokenizer(texts, verbose=False).input_ids:
        if len(row) > L:
            row = row[:L - 1] + row[-1:]                       # keep the end of text
        rows.append(row + [tokenizer.pad_token_id] * (L - len(row)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu")

# ---- The transformer that both towers share ------------------------------------------------------

def quick_gelu(x):
    """x * sigmoid(1.702 x), close to gelu. OpenAI's CLIP was trained with it."""
    return x * torch.sigmoid(1.702 * x)

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}      # of Stable Diffusion 1, and of 2

class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) -> (B, L, D). causal: no token sees those after it."""

    def __init__(self, width, heads, causal):
        super().__init__()
        assert width % heads == 0, f"a width of {width} does not split into {heads} heads"
        self.heads = heads
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q = self.split_heads(self.q_proj(x))                       # (B, nh, L, hs)
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))
        # Each token scores every token. 1/sqrt(hs) keeps the variance of the scores near 1, so that
        # softmax stays soft. Each output is the mean of all values, weighted by the scores.
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))   # (B, nh, L, L)
        if self.causal:
            # -inf above the diagonal, 0 elsewhere: softmax gives later tokens a weight of 0.
            scores = scores + torch.full_like(scores, float("-inf")).triu(1)
        y = scores.softmax(dim=-1) @ v                             # (B, nh, L, hs)
        return self.out_proj(y.transpose(1, 2).flatten(2))         # (B, L, D): join the heads

    def split_heads(self, x):
        """(B, L, D) -> (B, nh, L, hs), with D = nh * hs."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

class MLP(nn.Module):
    """Two layers on each token by itself. (B, L, D) -> (B, L, D)."""

    def __init__(self, width, inner, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))

class Block(nn.Module):
    """x + attention, then x + MLP, each after a layer norm. (B, L, D) -> (B, L, D)."""

    def __init__(self, config, causal):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, config["num_attention_heads"], causal)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config["intermediate_size"], config["hidden_act"])

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

class Blocks(nn.Module):
    """The stack of blocks. Published weights call it `encoder.layers`."""

    def __init__(self, config, causal):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config["num_hidden_layers"]):
            self.layers.append(Block(config, causal))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

# ---- The text tower ------------------------------------------------------------------------------

class TextEmbeddings(nn.Module):
    """ids (B, L) -> (B, L, D): which token it is, plus where it stands."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.position_embedding = nn.Embedding(config["max_position_embeddings"], width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)     # as OpenAI's CLIP began
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids):
        L = ids.size(1)
        most = self.position_embedding.num_embeddings
        assert L <= most, f"{L} tokens, but the text encoder takes {most}"
        return self.token_embedding(ids) + self.position_embedding.weight[:L]

class TextTransformer(nn.Module):
    """ids (B, L) -> (B, L, D), after the final layer norm."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        # Causal, without a mask for padding: padding comes last, so no word sees it. The U-Net
        # reads all L states, also those of padding, as in Stable Diffusion.
        self.encoder = Blocks(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])

    def forward(self, ids):
        x = self.embeddings(ids)
        x = self.encoder(x)
        return self.final_layer_norm(x)

class CLIPTextEncoder(nn.Module):
    """The text tower alone, as Stable Diffusion uses it. `CLIPTextEncoder()` is version 1's."""

    DEFAULTS = dict(
        vocab_size=49408,                 # V
        hidden_size=768,                  # D
        intermediate_size=3072,           # inner width of the MLP
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,       # the most tokens of a text, L
        hidden_act="quick_gelu",          # Stable Diffusion 2: gelu
        layer_norm_eps=1e-5,
        bos_token_id=49406,               # start of text
        eos_token_id=49407,               # end of text
        pad_token_id=49407,
    )

    def __init__(self, **config):
        super().__init__()
        self.config = {**self.DEFAULTS, **config}
        self.text_model = TextTransformer(self.config)

    @classmethod
    def from_config(cls, config):
        """Build from a published text_encoder/config.json (a dict), or from a whole CLIP's.

        ValueError names a key that asks for what this code does not do. Unknown keys are ignored.
        """
        config = config.get("text_config") or config
        check_config(config, "clip_text_model")
        for key in cls.DEFAULTS:
            if key in config and config[key] is None and "token_id" not in key:
                raise ValueError(f"{key} = null is not supported")
        # What a published config leaves out has transformers' defaults.
        config = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8) | config
        return cls(**{key: config[key] for key in cls.DEFAULTS if key in config})

    def to_config(self):
        """The dict that belongs in text_encoder/config.json, with transformers' keys."""
        return dict(self.config, architectures=["CLIPTextModel"], model_type="clip_text_model")

    def forward(self, ids):
        """ids (B, L) int64 -> context (B, L, D): what the U-Net's cross-attention reads."""
        return self.text_model(ids)

def check_config(config, model_type):
    """ValueError where a transformers config asks for another model or activation."""
    if config.get("model_type", model_type) != model_type:
        raise ValueError(f"model_type = {config['model_type']!r} is not {model_type!r}")
    if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise ValueError(f"hidden_act = {config['hidden_act']!r} is not quick_gelu or gelu")

# ---- The vision tower ----------------------------------------------------------------------------

class VisionEmbeddings(nn.Module):
    """x (B, 3, S, S) -> (B, 1 + (S/p)^2, D): a token for the whole picture, then its patches."""

    def __init__(self, config):
        super().__init__()
        width, p = config["hidden_size"], config["patch_size"]
        patches = (config["image_size"] // p) ** 2
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, width, p, stride=p, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, x):
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)       # (B, (S/p)^2, D)
        whole = self.class_embedding.expand(len(x), 1, -1)                 # (B, 1, D)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight

class VisionTransformer(nn.Module):
    """x (B, 3, S, S) -> (B, D), the last state of the whole picture's token (Dosovitskiy 2020)."""

    DEFAULTS = dict(                      # CLIP ViT-B/32, and what transformers assumes
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,                   # S
        patch_size=32,                    # p
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )

    def __init__(self, **config):
        super().__init__()
        self.config = config = {**self.DEFAULTS, **config}
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)       # misspelt in the published names
        self.encoder = Blocks(config, causal=False)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x):
        x = self.pre_layrnorm(self.embeddings(x))              # (B, 1 + (S/p)^2, D)
        x = self.encoder(x)
        return self.post_layernorm(x[:, 0])                    # (B, D)

# ---- Both towers, and the loss that ties them together -------------------------------------------

class CLIP(nn.Module):
    """Both towers, with a projection each into the shared space, and a learned temperature.

    text_config, vision_config: dicts as in a published CLIP's config.json.
    """

    MEAN = (0.48145466, 0.4578275, 0.40821073)      # of the colours that OpenAI's CLIP learned from
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, text_config, vision_config, projection_dim=512):
        super().__init__()
        check_config(vision_config, "clip_vision_model")
        known = VisionTransformer.DEFAULTS
        vision_config = {key: vision_config[key] for key in known if key in vision_config}
        text_encoder = CLIPTextEncoder.from_config(text_config)
        self.text_model = text_encoder.text_model
        self.vision_model = VisionTransformer(**vision_config)
        text_width = text_encoder.config["hidden_size"]
        vision_width = self.vision_model.config["hidden_size"]
        self.text_projection = nn.Linear(text_width, projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision_width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))      # section 2.5
        self.config = dict(
            text_config=text_encoder.to_config(),
            vision_config=dict(self.vision_model.config, model_type="clip_vision_model"),
            projection_dim=projection_dim,
        )

    @classmethod
    def from_config(cls, config):
        """Build from a published CLIP's config.json (a dict). ValueError as CLIPTextEncoder's."""
        projection_dim = config.get("projection_dim", 512)
        return cls(config["text_config"], config["vision_config"], projection_dim)

    def to_config(self):
        """The dict that belongs in config.json, with transformers' keys."""
        return dict(self.config, architectures=["CLIPModel"], model_type="clip")

    def text_encoder(self):
        """The text tower alone, as a CLIPTextEncoder that shares its weights."""
        with torch.device("meta"):
            encoder = CLIPTextEncoder.from_config(self.config["text_config"])
        encoder.text_model = self.text_model
        return encoder

    def encode_text(self, ids):
        """ids (B, L) -> unit vectors (B, P): the state at the end of text, projected."""
        states = self.text_model(ids)                          # (B, L, D)
        # The end of text has the largest id, and has read the whole caption. Take the first one.
        end = ids.argmax(dim=1)                                # (B,)
        pooled = states[torch.arange(len(ids), device=ids.device), end]
        return F.normalize(self.text_projection(pooled), dim=-1)

    def encode_image(self, x):
        """Square pictures x (B, 3, S, S) in [-1, 1], of any size -> unit vectors (B, P)."""
        size = self.vision_model.config["image_size"]
        if x.size(-1) != size:
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        mean = x.new_tensor(self.MEAN).view(3, 1, 1)
        std = x.new_tensor(self.STD).view(3, 1, 1)
        x = ((x + 1) / 2 - mean) / std
        return F.normalize(self.visual_projection(self.vision_model(x)), dim=-1)

    def forward(self, x, ids):
        """Pictures and their captions -> unit vectors (B, P) of each, 1 / temperature."""
        return self.encode_image(x), self.encode_text(ids), self.logit_scale.exp()

def contrastive_loss(images, texts, scale, ids):
    """Symmetric InfoNCE (Radford et al. 2021, Figure 3) -> (loss, accuracy), two scalars.

    images, texts (B, P): unit vectors of pictures and of their captions ids (B, L). Each picture is
    asked which of the B captions is its own, each caption which of the B pictures: two
    classifications with the right answers on the diagonal. To win, both towers must encode whatever
    tells these pictures apart. Where two pictures have the same caption, both answers are right, so
    these pairs are left out. accuracy: how often a picture prefers its own caption.
    """
    target = torch.arange(len(ids), device=ids.device)         # picture i belongs to caption i
    logits = scale * images @ texts.T                          # (B, B): picture i, caption j
    same = (ids[:, None] == ids[None, :]).all(dim=-1)          # (B, B): caption i equals caption j
    same.fill_diagonal_(False)
    logits = logits.float().masked_fill(same, float("-inf"))
    loss_images = F.cross_entropy(logits, target)
    loss_texts = F.cross_entropy(logits.T, target)
    accuracy = (logits.argmax(dim=1) == target).float().mean()
    return (loss_images + loss_texts) / 2, accuracy

# ---- Published weights ---------------------------------------------------------------------------

def rename_published(state):
    """{name: tensor} of a text tower or a whole CLIP under any published names -> our names.

    Stable Diffusion 1's single files have transformers' names behind a prefix; Stable Diffusion 2's
    have OpenCLIP's, with q, k and v in one matrix. transformers from 5.6 on leaves out text_model.
    Current names pass unchanged.
    """
    rules = [
        (r"^transformer\.text_model\.", "text_model."),                        # Stable Diffusion 1
        (r"^model\.transformer\.resblocks\.", "text_model.encoder.layers."),   # Stable Diffusion 2
        (r"^model\.token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^model\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^model\.ln_final\.", "text_model.final_layer_norm."),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.attn\.", ".self_attn."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),      # transformers 5.6
    ]
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:                                # in_proj_weight or in_proj_bias
            for letter, part in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            renamed[name] = tensor
    return renamed
