#!/bin/bash
# Runs tests on an emulated processor, for instruction sets that this one lacks: Debian, as root, a quarter of an hour.
#     BOCHS=path/to/bochs tests/kernels/emulate.sh sapphire_rapids -v tests/kernels/test_cpu.py
# The first argument is one of Bochs' models: sapphire_rapids has AVX512_BF16, AVX512_VNNI and AVX-VNNI; tigerlake has
# AVX512_VNNI alone of these, arrow_lake AVX-VNNI alone. The others are pytest's. BOCHS is of release 3.0 or later, made
# with --with-nogui --enable-x86-64 --enable-avx --enable-evex --enable-all-optimizations. The exit status is pytest's.
# For AMX, sapphire_rapids and --enable-amx, after `patch -p1 < bochs.patch` (beside this file) in the folder of Bochs 3.0.
# Tests that exist only there, as -k amx selects, should be joined by one that runs here too, or files that it opens lack.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=$1 python=${PYTHON:-$PWD/.venv/bin/python} work=$PWD/build/emulated
shift
mkdir -p "$work"

# 1. A kernel, unpacked, not installed.
apt-get install -qq --no-install-recommends bochsbios vgabios busybox-static cpio isolinux strace syslinux-common xorriso \
    > "$work/apt.log"
if [ ! -d "$work/kernel" ]; then
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2 }')
    (cd "$work" && apt-get download -qq "$package" && dpkg-deb -x "$package"_*.deb kernel)
fi

# 2. The root file system: the checkout, and every file that the tests look at here. It lies in memory, of which Bochs
# gives 2 GB; Triton is too large. MKL's AVX-512 code ends in an illegal instruction there.
export SVDIT_KERNELS=$work/kernels.so OMP_NUM_THREADS=1
"$python" -c "from svdit.kernels.cpu.build import *; compile_library(Path('$SVDIT_KERNELS'))"
strace -f -qq -z -e trace=%file -o "$work/trace" "$python" -m pytest -p no:cacheprovider "$@" > "$work/here.log" || true
image=$work/image disc=$work/disc
rm -rf "$image" "$disc" && mkdir -p "$image/bin" "$image/tmp" "$disc"
{ git ls-files | sed "s|^|$PWD/|"; ldd "$python" | grep -o '/[^ ]*'; grep -o '"/[^"]*"' "$work/trace" | tr -d '"'
  echo "$SVDIT_KERNELS"; } | grep -vE '^/(proc|sys|dev)/|/triton/' | sort -u |
    while read -r path; do [ ! -f "$path" ] || echo "$path"; done |
    xargs -d '\n' cp -L --parents --preserve=timestamps -t "$image"
cp /bin/busybox "$image/bin"
cat > "$image/init" <<END
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc && /bin/busybox --install -s /bin
mount -t sysfs sys /sys && mount -t devtmpfs dev /dev
export HOME=/tmp MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 SVDIT_KERNELS=$SVDIT_KERNELS
cd $PWD && grep -m1 flags /proc/cpuinfo
$python -m pytest -p no:cacheprovider ${*@Q}
echo "exit status \$?"
sleep 1 && poweroff -f # once the serial port has sent that
END
chmod +x "$image/init"
(cd "$image" && find . | cpio --quiet -o -H newc) > "$disc/image"

# 3. A disc that boots it. The kernel must not believe in fast short copies (fsrm): with Bochs its memory is overwritten.
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$disc"
cp "$work"/kernel/boot/vmlinuz-* "$disc/vmlinuz"
printf '%s\n' "DEFAULT linux" "LABEL linux" "LINUX /vmlinuz" "APPEND initrd=/image rdinit=/init console=ttyS0,115200 \
quiet nokaslr mitigations=off no5lvl clearcpuid=fsrm panic=-1 reboot=t" > "$disc/isolinux.cfg"
xorriso -report_about WARNING -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot \
    -boot-load-size 4 -boot-info-table "$disc"
: > "$work/console"
"${BOCHS:-bochs}" -q -f /dev/null "cpu: model=$model, ips=500000000, reset_on_triple_fault=0" \
    "memory: guest=2048, host=2048" "ata0-master: type=cdrom, path=$work/boot.iso, status=inserted" "boot: cdrom" \
    "display_library: nogui" "romimage: file=/usr/share/bochs/BIOS-bochs-latest" \
    "vgaromimage: file=/usr/share/vgabios/vgabios.bin" "com1: enabled=1, mode=file, dev=$work/console" \
    "log: $work/bochs.log" "panic: action=fatal" > "$work/bochs.out" 2>&1 &
trap 'kill $! 2> /dev/null || true' EXIT
tail -f --pid=$! "$work/console" 2> "$work/tail.log"
exit "$(sed -n 's/^exit status \([0-9]*\).*/\1/p' "$work/console" | grep . || echo 99)"
