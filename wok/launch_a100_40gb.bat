@setlocal
@set "CARD=a100_40gb"
@set "VRAM=40GB"
@call "%~dp0launch.bat" %*
