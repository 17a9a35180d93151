"""Writes what was trained as GGUF: the base, and one LoRA per skill.

    python export.py base --weights base.pt -o base.gguf
    python export.py loras --factors shared/ --alpha 16 -o loras/
"""

import argparse
import os

import gguf
import numpy
import torch

from model import BOS, EOS, SEP, VOCABULARY, Base

# Only the last line counts: every answer of the base and of its skills is to one line.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}<|sep|>"


def byte_characters():
    """The character that stands for each byte in vocabularies of the gpt2 kind."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, other = {}, 0
    for b in range(256):
        if b in kept:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + other)
            other += 1
    return [table[b] for b in range(256)]


class Writer(gguf.GGUFWriter):
    """Writes empty lists of strings too: a vocabulary of bytes has merges, namely none."""

    def _pack_val(self, val, vtype, add_vtype, sub_type=None):
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            head = self._pack("I", vtype) if add_vtype else b""
            return head + self._pack("I", gguf.GGUFValueType.STRING) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def write_base(state, path):
    model = Base()
    model.load_state_dict(state)
    s = model.shape
    w = Writer(path, "llama")
    w.add_name("Lory's demo base")
    w.add_description("A small decoder over bytes, trained on drawn tasks to read a prompt's form; its skills are adapters.")
    w.add_license("MIT OR Apache-2.0")
    w.add_context_length(512)
    w.add_embedding_length(s.width)
    w.add_block_count(s.layers)
    w.add_feed_forward_length(s.inner)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    w.add_rope_dimension_count(s.head)
    w.add_rope_freq_base(s.rope)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_vocab_size(VOCABULARY)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(byte_characters() + ["<s>", "</s>", "<|sep|>"])
    w.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3)
    w.add_key_value("tokenizer.ggml.merges", [], gguf.GGUFValueType.ARRAY)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_add_bos_token(True)
    w.add_chat_template(TEMPLATE)

    def add(name, p):
        data = p.detach().float().numpy()
        if data.ndim == 2:
            w.add_tensor(name, gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            w.add_tensor(name, data)

    add("token_embd.weight", model.embedding)
    add("output_norm.weight", model.norm)
    for i, block in enumerate(model.blocks):
        for name, p in block.items():
            add(f"blk.{i}.{name}.weight", p)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_lora(arrays, name, alpha, path):
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_name(name)
    w.add_float32("adapter.lora.alpha", alpha)
    for key, data in arrays.items():
        stem, _, side = key.rpartition(".")
        w.add_tensor(f"{stem}.weight.{side}", numpy.ascontiguousarray(data))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=("base", "loras"))
    arguments.add_argument("--weights")
    arguments.add_argument("--factors")
    arguments.add_argument("--alpha", type=float, default=16)
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    if args.what == "base":
        write_base(torch.load(args.weights), args.o)
        return
    os.makedirs(args.o, exist_ok=True)
    for file in sorted(os.listdir(args.factors)):
        name, kind = os.path.splitext(file)
        if kind == ".npz":
            write_lora(dict(numpy.load(os.path.join(args.factors, file))), name, args.alpha, os.path.join(args.o, name + ".gguf"))


if __name__ == "__main__":
    main()
