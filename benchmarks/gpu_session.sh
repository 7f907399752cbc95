#!/usr/bin/env bash
# Everything that waits for a CUDA GPU, in one call: native Triton tests, kernel benchmark, the 16x16 emoji models, the order table,
# the families at equal compute, the tokenizers, the continuous-token families.
# usage: bash benchmarks/gpu_session.sh OUT_FOLDER   (needs data/emoji, see `vgen data emoji`; stages can be picked: STAGES="tests bench")
set -euo pipefail
out=${1:?usage: bash benchmarks/gpu_session.sh OUT_FOLDER}
stages=${STAGES:-tests bench tokenizer model orders families tokenizers continuous}
mkdir -p "$out"
for stage in $stages; do
    case $stage in
        tests) python -m pytest tests/kernels tests/models 2>&1 | tee "$out/tests.log" ;;
        bench) python benchmarks/kernels.py 2>&1 | tee "$out/kernels.md" ;;
        tokenizer)
            python -m vgen.cli.main train configs/emoji/tokenizer_16x16.yaml 2>&1 | tee "$out/tokenizer.log"
            python -m vgen.cli.main tokenize --model runs/emoji/tokenizer_16x16/model --data data/emoji --out runs/tokens/emoji_16x16
            ;;
        model)
            python -m vgen.cli.main train configs/emoji/anyorder_16x16.yaml 2>&1 | tee "$out/model.log"
            cp -r runs/emoji/anyorder_16x16/model "$out/model"
            ;;
        orders)
            python benchmarks/emoji_orders.py --model runs/emoji/anyorder_16x16/model --tokens runs/tokens/emoji_16x16 --out "$out/emoji_orders_16x16"
            ;;
        families)
            python -m vgen.cli.main tokenize --model emoji-vq --data data/emoji --out runs/tokens/emoji
            python benchmarks/emoji_families.py --out "$out/emoji_families" 2>&1 | tee "$out/families.log"
            ;;
        tokenizers)
            python -m vgen.cli.main train configs/emoji/kl.yaml
            python -m vgen.cli.main train configs/emoji/flextok.yaml
            python benchmarks/emoji_tokenizers.py --model emoji-vq --model emoji-titok --model runs/emoji/flextok/model --model emoji-kl --out "$out/emoji_tokenizers"
            ;;
        continuous)
            python -m vgen.cli.main tokenize --model emoji-kl --data data/emoji --out runs/tokens/emoji_kl --low-res 32
            python benchmarks/emoji_continuous.py --out "$out/emoji_continuous" 2>&1 | tee "$out/continuous.log"
            ;;
        *) echo "unknown stage $stage" >&2; exit 2 ;;
    esac
done
