//! Joint compression of LoRA adapters into one shared-basis pack.
