/* For LD_PRELOAD: kills the process at the n-th step that changes the names below a folder.
 *
 * A step is a call of rename, link, symlink, unlink, rmdir, mkdir or one of their relatives. Nothing is counted until
 * kill_at_step() is called, and only in the process that called it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static pid_t armed;
static long step, last;
static int dies_before, log_to = -1;

/* Die right before or right after step n, counted from 1; of 0 never. Every step is written to a descriptor. */
void kill_at_step(const char *below, long n, int before, int log) {
  snprintf(folder, sizeof folder, "%s/", below);
  step = 0, last = n, dies_before = before, log_to = log, armed = getpid();
}

static int is_below(int at, const char *path) {
  char full[2 * PATH_MAX] = "";
  if (path[0] != '/') {
    char link[64];
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t size = readlink(link, full, PATH_MAX - 2);
    full[size < 0 ? 0 : size] = 0;
    strcat(full, "/");
  }
  strncat(full, path, PATH_MAX - 1);
  return strncmp(full, folder, strlen(folder)) == 0;
}

/* Counts a call that changes `path` or `to`; returns whether to die once it is made. */
static int counted(const char *call, int at, const char *path, int to_at, const char *to) {
  if (armed != getpid() || !(is_below(at, path) || is_below(to_at, to))) return 0;
  dprintf(log_to, "%s\t%s\t%s\n", call, path, to);
  if (++step != last) return 0;
  if (dies_before) raise(SIGKILL);
  return 1;
}

#define STEP(name, at, path, to_at, to, ...)                                          \
  {                                                                                   \
    int dies = counted(#name, at, path, to_at, to);                                   \
    int result = ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__);           \
    if (dies) raise(SIGKILL);                                                         \
    return result;                                                                    \
  }

int rename(const char *a, const char *b) STEP(rename, AT_FDCWD, a, AT_FDCWD, b, a, b)
int renameat(int m, const char *a, int n, const char *b) STEP(renameat, m, a, n, b, m, a, n, b)
int renameat2(int m, const char *a, int n, const char *b, unsigned f) STEP(renameat2, m, a, n, b, m, a, n, b, f)
int link(const char *a, const char *b) STEP(link, AT_FDCWD, b, AT_FDCWD, b, a, b)
int linkat(int m, const char *a, int n, const char *b, int f) STEP(linkat, n, b, n, b, m, a, n, b, f)
int symlink(const char *a, const char *b) STEP(symlink, AT_FDCWD, b, AT_FDCWD, b, a, b)
int symlinkat(const char *a, int n, const char *b) STEP(symlinkat, n, b, n, b, a, n, b)
int unlink(const char *a) STEP(unlink, AT_FDCWD, a, AT_FDCWD, a, a)
int unlinkat(int m, const char *a, int f) STEP(unlinkat, m, a, m, a, m, a, f)
int rmdir(const char *a) STEP(rmdir, AT_FDCWD, a, AT_FDCWD, a, a)
int mkdir(const char *a, mode_t f) STEP(mkdir, AT_FDCWD, a, AT_FDCWD, a, a, f)
int mkdirat(int m, const char *a, mode_t f) STEP(mkdirat, m, a, m, a, m, a, f)
