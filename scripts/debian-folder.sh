# shellcheck shell=sh
# A Debian in a folder, made by debootstrap: what scripts/bare.sh and scripts/peers.sh share.
#
# Sourced, after `who` was set to the word that messages begin with and `repository` to the
# checkout. Whoever starts something in a folder does it through `alone`, in mount and pid
# namespaces of its own: no mount and no process stays behind, however it ends.
#
# How this machine reaches package archives (apt's Acquire settings, pip's configuration and the
# local folders it names, certificates, proxies) is read from its configuration and handed on, so
# that a folder inside of a folder works as well.

: "${who:?}" "${repository:?}"

say() { printf '%s: %s\n' "$who" "$*"; }
fail() { printf '%s: %s\n' "$who" "$*" >&2; exit 1; }

plain_path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# debootstrap and pivot_root live in sbin, which is not on everybody's path.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export HOME="${HOME:-/root}"

# need_root: and what only root can use, installed where it is missing.
need_root() {
    [ "$(id -u)" = 0 ] || fail "needs root (chroot and mounts)"
    sh "$repository/scripts/setup.sh" peers
}

# lock exclusive|shared FILE: file descriptor 9 holds it, instead of what it held before, for as
# long as this process, or one it started, lives.
lock() {
    exec 9>"$2"
    flock "--$1" --nonblock 9 ||
        { say "waiting for another that uses ${2%.lock}"; flock "--$1" 9; }
}

# Debian's mirror as apt knows it here; of a security or a third party's archive there is no use.
mirror() {
    # shellcheck disable=SC2016
    found=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' |
        grep -E '/debian/?$' | head -n 1)}
    [ -n "$found" ] || fail "apt names no Debian mirror here: set DEBIAN_MIRROR"
    printf '%s\n' "$found"
}

alone() { unshare --mount --propagation private --pid --fork --kill-child "$@"; }

# make_folder CODENAME ROOT: ROOT anew, with Debian's smallest set of packages. Killed in the
# middle, debootstrap leaves no mount in ROOT, since it had a namespace for them.
make_folder() {
    address=$(mirror) || exit 1
    say "debootstrap $1 from $address (minutes)"
    rm -rf --one-file-system "$2" || fail "what is left of $2 cannot be removed"
    alone --mount-proc debootstrap --variant=minbase "$1" "$2" "$address" >"$2.log" ||
        fail "debootstrap failed, see $2.log"
}

# Folders that pip's settings name, by path or by file: URI. An index's files may lie beside it.
pip_folders() {
    {
        cat /etc/pip.conf "$HOME/.config/pip/pip.conf" 2>/dev/null || true
        env | grep '^PIP_' || true
    } | tr ' =,' '[\n*]' | sed -n 's,^file://,,; s,/simple/*$,,; /^\//p' | sort -u |
        while read -r path; do
            if [ -d "$path" ]; then printf '%s\n' "$path"; fi
        done
}

# hand_on ROOT: how archives are reached, into ROOT.
hand_on() {
    cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
    apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' \
        >"$1/etc/apt/apt.conf.d/90outside" || true
    if [ -d /usr/local/share/ca-certificates ]; then
        cp -r /usr/local/share/ca-certificates "$1/usr/local/share/"
    fi
    mkdir -p "$1/etc/ssl/certs" "$1/root/.config/pip"
    hand_on_file /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/ca-certificates.crt"
    hand_on_file /etc/pip.conf "$1/etc/pip.conf"
    hand_on_file "$HOME/.config/pip/pip.conf" "$1/root/.config/pip/pip.conf"
    pip_folders >"$1/outside-folders"
}

hand_on_file() { if [ -e "$1" ]; then cp -L "$1" "$2"; fi; }

# mount_folder ROOT: inside of `alone`, what a running Debian has in its root.
mount_folder() {
    mount --bind "$1" "$1"
    mount -t proc proc "$1/proc"
    mount --rbind /sys "$1/sys"
    mount --rbind /dev "$1/dev"
    mount -t tmpfs tmpfs "$1/run"
    while read -r path; do
        mkdir -p "$1$path"
        mount --bind -o ro "$path" "$1$path"
    done <"$1/outside-folders"
}

# enter ROOT FOLDER COMMAND...: inside of `alone`, run COMMAND in ROOT, in its FOLDER, and exit as
# it does. The shell stays the namespace's first process: orphans become its children, and are
# zombies for ever (to libvirt a QEMU that does not die) unless it waits for them, as a shell does.
enter() {
    cd "$1" || fail "$1 is not there"
    shift
    for name in $(env | sed -n 's/^\([A-Za-z_][A-Za-z_0-9]*\)=.*/\1/p'); do
        case "$name" in
            PIP_* | http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY) ;;
            SSL_CERT_* | TERM | CI) ;;
            *) unset "$name" ;;
        esac
    done
    export HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" PATH="$plain_path"
    # Not only chroot: in one, the root is no mount point, and user namespaces are refused.
    mkdir -p outside
    pivot_root . outside
    exec sh -c 'umount -l /outside && cd "$1" || exit; shift; "$@"; exit "$?"' sh "$@"
}
