// First process of the emulated machine: runs the program named by /args, reports its exit code on the serial line,
// powers off.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_WORDS = 512, FILE_BYTES = 1 << 16 };

static void power_off(void) {
  sync();
  iopl(3);
  for (const char* c = "Shutdown"; *c; ++c) outb(*c, 0x8900);  // the emulator's shutdown port
  for (;;) pause();
}

// Points words at the NUL-terminated words of a file; the list ends with NULL.
static void read_words(const char* path, char* buffer, char** words) {
  int count = 0;
  int fd = open(path, O_RDONLY);
  ssize_t bytes = fd < 0 ? 0 : read(fd, buffer, FILE_BYTES - 1);
  char* end = buffer + (bytes > 0 ? bytes : 0);
  for (char* p = buffer; p < end && count < MAX_WORDS - 1; p += strlen(p) + 1) words[count++] = p;
  words[count] = NULL;
  if (fd >= 0) close(fd);
}

static int run(char** args, char** env) {
  pid_t child = fork();
  if (child == 0) {
    execve(args[0], args, env);
    dprintf(2, "cannot run %s: %s\n", args[0], strerror(errno));
    _exit(127);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(void) {
  static char arg_bytes[FILE_BYTES], env_bytes[FILE_BYTES];
  static char *args[MAX_WORDS], *env[MAX_WORDS];
  mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
  mount("proc", "/proc", "proc", 0, NULL);
  mount("sysfs", "/sys", "sysfs", 0, NULL);
  mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
  int serial = open("/dev/ttyS0", O_RDWR);
  if (serial < 0) power_off();
  for (int fd = 0; fd < 3; ++fd) dup2(serial, fd);
  read_words("/args", arg_bytes, args);
  read_words("/env", env_bytes, env);
  dprintf(1, "@@BEGIN\n");
  dprintf(1, "\n@@END %d\n", run(args, env));
  fsync(1);
  usleep(200000);  // lets the serial line drain
  power_off();
}
