#!/bin/bash
# Runs a statically linked Linux program on an emulated CPU that has AVX-512 (Bochs, model Skylake-X).
#   run_avx512.sh BINARY [ARGS...]
# Prints what the program prints and exits with its exit code; 125 means that the emulator failed or ran out of time.
# Settings, from the environment:
#   AVX512_MEMORY   emulated memory in MiB (1024)
#   AVX512_TIMEOUT  wall-clock limit in seconds (1800)
#   AVX512_ENV      environment of the program: "NAME=VALUE NAME=VALUE"
#   AVX512_MODEL    model of the CPU (corei7_skylake_x); Linux 6.1 does not boot on Bochs 2.7's later ones
#   AVX512_CACHE    folder that keeps the kernel and the first process between runs
#   AVX512_KEEP     1: keep the work folder and name it
# Needs the Debian packages bochs bochs-term seabios vgabios isolinux syslinux-common xorriso cpio bsdutils
# binutils gcc libc6-dev.
set -euo pipefail

fail() { echo "run_avx512: $*" >&2; exit 125; }

ips=10000000   # emulated instructions per emulated second: small, so that the waits of the boot cost few instructions

prepare_cache() {
    mkdir -p "$cache"
    if [ ! -x "$cache/init" ] || [ "$here/init.c" -nt "$cache/init" ]; then
        gcc -O2 -static -o "$cache/init" "$here/init.c"
    fi
    [ -e "$cache/vmlinuz" ] && return
    local package
    package="$(apt-cache depends --important linux-image-cloud-amd64 | awk '/Depends:/ {print $2; exit}')"
    [ -n "$package" ] || fail "no package linux-image-cloud-amd64 in the lists of apt; run apt-get update"
    (cd "$cache" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x "$package"_*.deb kernel)
    mv "$cache"/kernel/boot/vmlinuz-* "$cache/vmlinuz"
    rm -rf "$cache/kernel" "$cache"/*.deb
}

# make_image BINARY ARGS...: a bootable CD image whose first process runs BINARY with ARGS.
make_image() {
    local binary="$1"; shift
    mkdir -p "$work"/tree/{bin,dev,proc,sys,tmp} "$work"/iso
    install -m 755 "$cache/init" "$work/tree/init"
    install -m 755 "$binary" "$work/tree/bin/"
    for word in "/bin/$(basename "$binary")" "$@"; do printf '%s\0' "$word" >>"$work/tree/args"; done
    : >"$work/tree/env"; for word in ${AVX512_ENV:-}; do printf '%s\0' "$word" >>"$work/tree/env"; done
    (cd "$work/tree" && find . | cpio --quiet -o -H newc >"$work/iso/initrd")
    cp "$cache/vmlinuz" /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/iso/"
    # Without noxsaves and clearcpuid (XSAVEC, XSAVES) Linux finds that the model's compacted XSAVE area has an unexpected
    # size and turns AVX off. The other options shorten the boot: no self-tests of the crypto code, no calibration loops.
    local options="console=ttyS0,115200 loglevel=3 panic=-1 rdinit=/init noxsaves clearcpuid=321,323 mitigations=off"
    options+=" nokaslr random.trust_cpu=on cryptomgr.notests no_timer_check tsc_early_khz=$((ips / 1000)) lpj=$((ips / 250))"
    cat >"$work/iso/isolinux.cfg" <<CFG
default test
prompt 0
label test
  kernel vmlinuz
  initrd initrd
  append $options
CFG
    xorriso -report_about WARNING -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot \
        -boot-load-size 4 -boot-info-table "$work/iso" 2>"$work/xorriso.log" || fail "no CD image: $(tail -1 "$work/xorriso.log")"
}

write_machine() {
    cat >"$work/bochsrc" <<CFG
display_library: term
config_interface: textconfig
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, gameport=0, serial=1
cpu: model=${AVX512_MODEL:-corei7_skylake_x}, count=1, ips=$ips, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=$memory, host=$memory
romimage: file=/usr/share/seabios/bios.bin
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
clock: sync=none, time0=local
com1: enabled=1, mode=file, dev=$work/serial
log: $work/bochs.log
panic: action=fatal
error: action=report
info: action=report
debug: action=ignore
CFG
    echo continue >"$work/debugger"   # Debian's Bochs is built with its debugger and starts stopped
}

[ $# -ge 1 ] || fail "usage: run_avx512.sh BINARY [ARGS...]"
[ -f "$1" ] || fail "no program at $1"
readelf -lW "$1" | grep -q INTERP && fail "$1 is dynamically linked; link it with -static"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cache="${AVX512_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/run_avx512}"
memory="${AVX512_MEMORY:-1024}"
limit="${AVX512_TIMEOUT:-1800}"
work="$(mktemp -d)"
if [ -n "${AVX512_KEEP:-}" ]; then echo "run_avx512: work folder $work" >&2; else trap 'rm -rf "$work"' EXIT; fi
prepare_cache
make_image "$@"
write_machine
SECONDS=0
# The text display needs a terminal; script(1) gives it one.
TERM=xterm script -qec "timeout --foreground -s KILL $limit bochs-bin -q -unlock -f $work/bochsrc -rc $work/debugger" \
    /dev/null </dev/null >"$work/screen" 2>&1 || true
if [ ! -e "$work/serial" ]; then tail -5 "$work/screen" >&2; fail "the emulator did not start"; fi
tr -d '\r' <"$work/serial" | sed -e '0,/^@@BEGIN$/d' >"$work/output"
sed -e '/^@@END [0-9]*$/d' "$work/output"
code="$(sed -n 's/^@@END \([0-9]*\)$/\1/p' "$work/output" | tail -1)"
if [ -z "$code" ]; then
    tail -n 3 "$work/serial" "$work/bochs.log" >&2
    fail "the program did not end within $SECONDS s (limit $limit s)"
fi
steps="$(grep -ao '^(0)\.\[[0-9]*\]' "$work/screen" | tr -dc '0-9\n' | sed 's/^0//' | tail -1 || true)"
echo "run_avx512: exit code $code after $SECONDS s, about $((${steps:-0} / 1000000)) million instructions with the boot" >&2
exit "$code"
